"""Fine-tune a Vision Transformer with SRLoRA, and compare with Keras's LoRA.

    python examples/vit_image_classification.py

needs no download. It first pretrains a small ViT of KerasHub on handwritten
digits from 0 to 4 and keeps it, as a KerasHub preset, for the next time. Then
it adapts that ViT to digits from 5 to 9, with both methods, prints what was
recomposed and when and a table, and saves both loss curves as a picture.

With a network there is more to choose from: any ViT preset of KerasHub, and any
image classification of `tensorflow_datasets`.

    python examples/vit_image_classification.py \\
        --preset vit_base_patch16_224_imagenet --dataset cifar100 \\
        --rank 8 --target-rank 64 --epochs 1 --train-examples 0 \\
        --learning-rate 1e-3 --lora-learning-rate 1e-3
"""

import functools
import itertools
import os

import _compare
import _data
import keras
import keras_hub
import tensorflow as tf

# The kernels of attention and feed-forward. `enable_srlora` would find them by
# itself; Keras's LoRA would adapt only query and value.
TARGETS = ["query", "key", "value", "attention_output", "dense_1", "dense_2"]


def main():
    args = parse_arguments()
    preset = args.preset or pretrained_vit(args)
    train, validation, info = _data.load(
        args.dataset,
        args.train_examples,
        args.validation_examples,
        args.cache_dir,
    )
    num_classes = info.features["label"].num_classes
    task = _compare.Task(
        title=f"{args.preset or 'Small ViT'} on {info.full_name}",
        load_backbone=lambda: keras_hub.models.ViTBackbone.from_preset(preset),
        add_head=lambda backbone: add_head(backbone, num_classes),
        target_layer_names=TARGETS,
        train=train,
        validation=validation,
        convert=make_convert(
            keras_hub.layers.ViTImageConverter.from_preset(preset), info
        ),
    )
    _compare.compare(task, args)


def add_head(backbone, num_classes):
    """One dense layer on the class token."""
    class_token = backbone.output[:, 0]
    logits = keras.layers.Dense(
        num_classes,
        # The same head for both methods and on each backend.
        kernel_initializer="zeros",
        name="logits",
    )(class_token)
    return keras.Model(backbone.input, logits)


def make_convert(converter, info):
    """From an example of a data set to a pair `(x, y)` for `fit`."""
    if "image" not in info.features:
        raise SystemExit(
            f"{info.full_name} has no `image`, but the features "
            f"{list(info.features)}. Choose another --dataset."
        )

    def convert(example):
        image = tf.cast(example["image"], "float32")
        if image.shape[-1] == 1:
            image = tf.image.grayscale_to_rgb(image)
        # Resizes and scales as in pretraining.
        return converter(image), example["label"]

    return convert


# The ViT that needs no download.


def pretrained_vit(args):
    """Folder of the small ViT; the first time, it is pretrained here."""
    name = "small_vit_smoke" if args.smoke else "small_vit"
    folder = _data.cache_folder(args.cache_dir) / name
    if not folder.exists():
        # Under another name until it is complete.
        unfinished = folder.with_name(f"{name}_{os.getpid()}")
        pretrain(unfinished, args)
        unfinished.rename(folder)
    print(f"The pretrained ViT is in {folder}", flush=True)
    return str(folder)


def pretrain(folder, args):
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=2,
        num_layers=2 if args.smoke else 4,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
    )
    converter = keras_hub.layers.ViTImageConverter(
        image_size=(8, 8), scale=1 / 127.5, offset=-1.0
    )
    train, validation, info = _data.load("digits_0_to_4", cache=args.cache_dir)
    convert = make_convert(converter, info)
    train = moved_by_a_pixel(train).map(convert).cache()
    validation = validation.map(convert).cache()
    run = _compare.fit(
        "Pretraining a small ViT on digits from 0 to 4, once",
        add_head(backbone, num_classes=5),
        train.shuffle(len(train), seed=0).batch(64),
        validation.batch(64),
        learning_rate=1e-3,
        epochs=1 if args.smoke else 10,
    )
    if run.accuracy < (0.5 if args.smoke else 0.9):
        raise SystemExit(
            f"The ViT was not pretrained well: accuracy {run.accuracy:.3f}"
        )
    backbone.save_to_preset(folder)
    converter.save_to_preset(folder)


def moved_by_a_pixel(images):
    """Each image, moved in eight directions and as it is: nine for one."""

    def move(example, y, x):
        padded = tf.pad(example["image"], [[1, 1], [1, 1], [0, 0]])
        return {**example, "image": padded[y : y + 8, x : x + 8]}

    moved = [
        images.map(functools.partial(move, y=y, x=x))
        for y, x in itertools.product(range(3), repeat=2)
    ]
    return functools.reduce(tf.data.Dataset.concatenate, moved)


def parse_arguments():
    parser = _compare.make_parser(
        __doc__,
        dataset="digits_5_to_9",
        rank=4,
        target_rank=32,
        epochs=20,
        batch_size=32,
        learning_rate=3e-3,
        lora_learning_rate=3e-3,
        train_examples=0,
        validation_examples=0,
        output="outputs/vit_image_classification",
    )
    return _compare.parse_arguments(
        parser, epochs=2, batch_size=16, train_examples=256
    )


if __name__ == "__main__":
    main()
