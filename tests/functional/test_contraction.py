"""Einsum equations as products of matrices, against np.einsum."""

import keras
import numpy as np
import pytest
from support import effective
from support import to_numpy

import keras_srlora
from keras_srlora.functional import contraction

# (equation, input shape, output_shape argument, (in, out) of the matrix).
EQUATIONS = [
    ("ab,bc->ac", (5, 8), 6, (8, 6)),
    ("abc,cd->abd", (2, 5, 8), (None, 6), (8, 6)),
    ("abc,cde->abde", (2, 5, 8), (None, 3, 4), (8, 12)),
    ("bqm,muh->bquh", (2, 5, 8), (None, 3, 4), (8, 12)),
    ("bquh,uhm->bqm", (2, 5, 3, 4), (None, 8), (12, 8)),
    ("btd,ndh->btnh", (2, 5, 8), (None, 3, 4), (8, 12)),
    ("btnh,nhd->btd", (2, 5, 3, 4), (None, 8), (12, 8)),
    ("btd,dnh->btnh", (2, 5, 8), (None, 3, 4), (8, 12)),
    ("bsd,dkh->bskh", (2, 5, 8), (None, 3, 4), (8, 12)),
    ("th,ehm->etm", (5, 8), (5, 6), (8, 18)),
    ("abc,bd->adc", (2, 8, 5), (6, None), (8, 6)),
    ("abcd,bdce->ae", (2, 3, 4, 2), 9, (24, 9)),
    ("abcd,dbe->ace", (2, 3, 5, 4), (None, 7), (12, 7)),
    ("...x,xy->...y", (2, 5, 8), 6, (8, 6)),
    ("...x,xy->...y", (2, 3, 5, 8), 6, (8, 6)),
    ("...xz,xyz->...y", (2, 5, 4, 3), 6, (12, 6)),
    ("ab...,bc->ac...", (2, 8, 5, 3), 6, (8, 6)),
    ("abc,c->ab", (2, 5, 8), (None,), (8, 1)),
]


def build(equation, shape, output_shape, **kwargs):
    if equation == "th,ehm->etm":
        # Keras takes the first output dimension for the batch: build by hand.
        pytest.skip("Keras's EinsumDense cannot infer this kernel's shape")
    return keras_srlora.SRLoRAEinsumDense(equation, output_shape, **kwargs)


@pytest.mark.parametrize("equation, shape, output_shape, size", EQUATIONS)
def test_output_equals_einsum_with_the_effective_kernel(
    equation, shape, output_shape, size, rng
):
    layer = build(equation, shape, output_shape, rank=1, lora_alpha=3)
    x = rng.standard_normal(shape).astype("float32")
    plain = to_numpy(layer(x))
    np.testing.assert_allclose(
        plain, np.einsum(equation, x, to_numpy(layer.kernel)), atol=1e-5
    )
    layer.initialize_factors()
    np.testing.assert_allclose(to_numpy(layer(x)), plain, atol=1e-5)
    for factor in layer.factors:
        factor.assign(rng.standard_normal(factor.shape))
    expected = np.einsum(equation, x, effective(layer))
    np.testing.assert_allclose(to_numpy(layer(x)), expected, atol=1e-4)


@pytest.mark.parametrize("equation, shape, output_shape, size", EQUATIONS)
def test_kernel_is_read_as_the_right_matrix(
    equation, shape, output_shape, size, rng
):
    layer = build(equation, shape, output_shape, rank=1)
    layer.build(shape)
    a, b = layer.factors
    assert (a.shape[1], b.shape[1]) == size


@pytest.mark.parametrize(
    "equation, kernel_shape, reason",
    [
        ("eth,ehm->etm", (3, 8, 6), "a batch of kernels"),
        ("ab,b->ab", (8,), "a batch of kernels"),
        ("ab,c->abc", (8,), "no dimension is contracted"),
        ("abc,cd->ad", (8, 6), "'b' is summed in the input alone"),
        ("ab,bcd->ac", (8, 6, 2), "'d' is summed in the kernel alone"),
        ("aab,bc->ac", (8, 6), "'a' is repeated"),
    ],
)
def test_other_equations_are_refused_by_name(equation, kernel_shape, reason):
    ndim = len(equation.split(",")[0])
    with pytest.raises(ValueError) as error:
        contraction.analyze(equation, ndim, kernel_shape)
    assert equation in str(error.value) and reason in str(error.value)


def test_a_batch_of_kernels_is_refused_when_the_layer_is_built():
    layer = keras_srlora.SRLoRAEinsumDense("eth,ehm->etm", (5, 6), rank=1)
    with pytest.raises(ValueError, match="a batch of kernels"):
        layer.build((3, 5, 8))


@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_dense_takes_any_number_of_dimensions(ndim, rng):
    shape = (2, 3, 5)[: ndim - 1] + (8,)
    layer = keras_srlora.SRLoRADense(6, rank=2, activation="gelu")
    x = rng.standard_normal(shape).astype("float32")
    layer(x)
    layer.initialize_factors()
    plain = keras.layers.Dense(6, activation="gelu")
    plain.build(shape)
    plain.set_weights([effective(layer), to_numpy(layer.bias)])
    np.testing.assert_allclose(
        to_numpy(layer(x)), to_numpy(plain(x)), atol=1e-5
    )
