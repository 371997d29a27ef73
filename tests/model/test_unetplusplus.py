"""The model: seeded weights, and an encoder that is loaded or refused."""

import copy
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from matchai.model.dropout import keyed_layers, set_dropout
from matchai.model.encoder_weights import read_weights
from matchai.model.unetplusplus import build_model
from matchai.system.errors import InputError

RECIPE = "timm-efficientnet-b3"
TOUCHED = "touched_by_a_pickle"


@cache
def _built(encoder: str, seed: int) -> nn.Module:
    return build_model(encoder, 4, seed=seed)


def built(encoder: str = "resnet18", seed: int = 0) -> nn.Module:
    return copy.deepcopy(_built(encoder, seed))


@cache
def colour_weights(encoder: str) -> dict[str, Tensor]:
    """A 3-channel encoder's state dict as smp names it, every tensor random."""
    weights: dict[str, Tensor] = smp.encoders.get_encoder(encoder, in_channels=3, weights=None).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(weight.shape, generator=generator) if weight.is_floating_point() else weight
        for name, weight in weights.items()
    }


def images(batch: int) -> Tensor:
    return torch.randn(batch, 1, 64, 64, generator=torch.Generator().manual_seed(2))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_seed_gives_the_same_weights() -> None:
    torch.manual_seed(123)
    assert same(build_model("resnet18", 4, seed=0).state_dict(), built().state_dict())


def test_another_seed_gives_other_weights() -> None:
    assert not same(built(seed=1).state_dict(), built(seed=0).state_dict())


def test_the_global_random_state_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    model = build_model(RECIPE, 4, seed=5)
    set_dropout(keyed_layers(model), 0, 0, [0])
    assert torch.equal(torch.get_rng_state(), before)


def test_images_become_logits_of_the_same_size() -> None:
    assert built().eval()(images(2)).shape == (2, 4, 64, 64)


@pytest.mark.parametrize("encoder", ["resnet18", RECIPE])
def test_every_trained_parameter_gets_a_gradient_and_every_frozen_one_gets_none(encoder: str) -> None:
    model = built(encoder).train()
    set_dropout(keyed_layers(model), 0, 0, [0, 1])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(images(2)).square().mean().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_the_recipes_unused_parameters_are_frozen() -> None:
    frozen = {name for name, parameter in built(RECIPE).named_parameters() if not parameter.requires_grad}
    assert "encoder.conv_head.weight" in frozen
    assert all(name.startswith(("encoder.conv_head", "encoder.bn2")) for name in frozen)


def test_a_built_model_holds_no_gradient_and_trains() -> None:
    model = _built(RECIPE, 0)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("wrong", "nearest"), [("resnet81", "resnet18"), ("timm-efficientnet-b33", RECIPE)])
def test_an_unknown_encoder_is_told_with_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"{wrong}.*did you mean.*{nearest}"):
        build_model(wrong, 4)


def summed_over_colours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What smp's rule makes of colour weights for one channel: the filters' sum (`patch_first_conv`)."""
    return {n: w.sum(1, keepdim=True) if w.ndim == 4 and w.shape[1] == 3 else w for n, w in weights.items()}


def assert_encoder_holds(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found: Any = model.get_submodule("encoder").state_dict()
    for name, weight in expected.items():
        if name in found:
            assert torch.allclose(found[name], weight, rtol=1e-6, atol=0), name


@pytest.mark.parametrize("prefix", ["", "encoder."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_colour_weights_is_loaded_and_its_first_filters_summed(
    tmp_path: Path, suffix: str, prefix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    named = {prefix + name: weight for name, weight in colour_weights("resnet18").items()}
    if suffix == ".pth":
        torch.save(named, path)
    else:
        safetensors.torch.save_file(named, path)
    model = build_model("resnet18", 4, encoder_weights=str(path))
    assert_encoder_holds(model, summed_over_colours(colour_weights("resnet18")))


def test_a_file_of_one_channel_weights_is_loaded_as_it_is(tmp_path: Path) -> None:
    weights = summed_over_colours(colour_weights("resnet18"))
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    assert_encoder_holds(build_model("resnet18", 4, encoder_weights=str(tmp_path / "weights.safetensors")), weights)


def test_the_recipes_encoder_is_loaded_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(colour_weights(RECIPE), path)
    model = build_model(RECIPE, 4, encoder_weights=str(path))
    assert_encoder_holds(model, summed_over_colours(colour_weights(RECIPE)))


@pytest.mark.parametrize("encoder", ["resnet18", "tu-test_resnet"])
@pytest.mark.parametrize(("held", "wanted"), [(3, 1), (3, 3), (3, 9), (1, 3), (1, 5), (5, 5)])
def test_the_first_filters_of_a_file_are_shared_out_to_the_channels(
    encoder: str, held: int, wanted: int, tmp_path: Path
) -> None:
    """So an image of equal channels looks as it did before: for colours, where each is used equally often."""
    reference = smp.encoders.get_encoder(encoder, in_channels=held, weights=None).eval()
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    weights = str(tmp_path / "weights.safetensors")
    model: Any = build_model(encoder, 4, in_channels=wanted, encoder_weights=weights).eval()
    assert model(images(2).expand(2, wanted, 64, 64)).shape == (2, 4, 64, 64)
    features = model.encoder(images(2).expand(2, wanted, 64, 64))[-1]
    torch.testing.assert_close(features, reference(images(2).expand(2, held, 64, 64))[-1], rtol=1e-4, atol=1e-5)


def test_colours_are_shared_out_as_smp_does(tmp_path: Path) -> None:
    safetensors.torch.save_file(colour_weights("resnet18"), tmp_path / "weights.safetensors")
    model: Any = build_model("resnet18", 4, in_channels=5, encoder_weights=str(tmp_path / "weights.safetensors"))
    reference = smp.encoders.get_encoder("resnet18", in_channels=3, weights=None)
    reference.load_state_dict(dict(colour_weights("resnet18")))
    reference.set_in_channels(5, pretrained=True)
    assert same(model.encoder.state_dict(), reference.state_dict())


def test_weights_for_another_number_of_channels_are_refused(tmp_path: Path) -> None:
    weights = smp.encoders.get_encoder("resnet18", in_channels=5, weights=None).state_dict()
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"conv1\.weight"):
        build_model("resnet18", 4, in_channels=3, encoder_weights=str(tmp_path / "weights.safetensors"))


def test_with_a_file_too_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(colour_weights("resnet18"), path)
    first, second = (build_model("resnet18", 4, encoder_weights=str(path), seed=3) for _ in range(2))
    assert same(first.state_dict(), second.state_dict())


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(colour_weights("resnet18"), path)
    with pytest.raises(InputError, match="does not hold the weights of encoder resnet34"):
        build_model("resnet34", 4, encoder_weights=str(path))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights = {**colour_weights("resnet18"), "layer1.0.bn1.weight": torch.ones(7)}
    safetensors.torch.save_file(weights, path)
    with pytest.raises(InputError, match=r"layer1\.0\.bn1\.weight is \(7,\)"):
        build_model("resnet18", 4, encoder_weights=str(path))


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pth"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        build_model("resnet18", 4, encoder_weights=str(tmp_path / name))


@pytest.mark.parametrize("name", ["text.safetensors", "text.pth"])
def test_a_file_of_no_tensors_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("no weights")
    with pytest.raises(InputError, match="no file of tensors"):
        build_model("resnet18", 4, encoder_weights=str(tmp_path / name))


def small_weights() -> dict[str, Tensor]:
    return dict(colour_weights("tu-test_resnet"))


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "a checkpoint": lambda weights: {"state_dict": weights, "epoch": 3},
    "a checkpoint of a model": lambda weights: {"model": weights, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "an unusual name": lambda weights: {"net": weights, "epoch": 3},
    "two nests": lambda weights: {"model": {"state_dict": weights}},
    "prefixes": lambda weights: {f"module.encoder.{name}": weight for name, weight in weights.items()},
    "timm's own names": lambda weights: {name.removeprefix("model."): weight for name, weight in weights.items()},
    "a classifier beside": lambda weights: {**weights, "fc.weight": torch.ones(10, 64), "epoch": 3},
    "half precision": lambda weights: {name: one.half() if one.ndim else one for name, one in weights.items()},
    "no counts of batches": lambda weights: {n: w for n, w in weights.items() if not n.endswith("batches_tracked")},
    "parameters": lambda weights: {n: nn.Parameter(w) if w.is_floating_point() else w for n, w in weights.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_obviously_holds_the_weights_is_loaded(layout: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](small_weights()), tmp_path / "weights.pth")
    model: Any = build_model("tu-test_resnet", 4, encoder_weights=str(tmp_path / "weights.pth"))
    expected = summed_over_colours(small_weights())
    found = model.encoder.state_dict()
    for name, weight in expected.items():
        if weight.ndim:
            torch.testing.assert_close(found[name], weight, rtol=2e-3, atol=2e-3)


FIRST = "model.conv1.0.weight"
BROKEN: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "one dimension for four": lambda weights: {name: weight.flatten() for name, weight in weights.items()},
    "four dimensions for one": lambda weights: {**weights, "model.bn1.weight": torch.rand(32, 3, 1, 1)},
    "scalars": lambda weights: dict.fromkeys(weights, torch.tensor(1.0)),
    "a missing weight": lambda weights: {name: weight for name, weight in weights.items() if name != FIRST},
    "whole numbers": lambda weights: {name: weight.int() for name, weight in weights.items()},
    "complex numbers": lambda weights: {**weights, FIRST: weights[FIRST].to(torch.complex64)},
    "a value that is not finite": lambda weights: {**weights, FIRST: weights[FIRST] * torch.nan},
    "sparse weights": lambda weights: {**weights, FIRST: weights[FIRST].to_sparse()},
    "weights of no memory": lambda weights: {**weights, FIRST: weights[FIRST].to("meta")},
}


@pytest.mark.parametrize("layout", BROKEN)
def test_a_file_of_another_layout_is_one_problem(layout: str, tmp_path: Path) -> None:
    torch.save(BROKEN[layout](small_weights()), tmp_path / "weights.pth")
    with pytest.raises(InputError, match="does not hold the weights of encoder tu-test_resnet") as caught:
        build_model("tu-test_resnet", 4, encoder_weights=str(tmp_path / "weights.pth"))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {}, {1: torch.ones(1)}, {"epoch": 3}], ids=str)
def test_a_file_without_named_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="no file of tensors"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(small_weights(), path)
    else:
        safetensors.torch.save_file(small_weights(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="no file of tensors"):
        read_weights(path)


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    torch.save(small_weights(), tmp_path / "weights.safetensors")
    safetensors.torch.save_file(small_weights(), tmp_path / "weights.pth")
    for path in tmp_path.iterdir():
        assert same(read_weights(path), small_weights())


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_is_no_file_is_told(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "absent")
    with pytest.raises(InputError, match=f"it is a {kind}"):
        read_weights(path)


@pytest.mark.parametrize("encoder", ["mit_b0", "tu-test_vit", "tu-resnet18.nobody_in1k"])
@pytest.mark.parametrize("weights", ["none", "imagenet"])
def test_an_encoder_that_no_unet_takes_is_one_problem(
    encoder: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=f"Encoder {encoder} cannot be built into a UNet") as caught:
        build_model(encoder, 4, encoder_weights=weights, image_size=64)
    assert len(caught.value.problems) == 1


SWIN = "tu-swin_tiny_patch4_window7_224"


@pytest.mark.parametrize("image_size", [64, 224])
def test_an_encoder_of_one_size_is_built_for_the_slices(image_size: int) -> None:
    model = build_model(SWIN, 4, image_size=image_size).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, image_size, image_size)).shape == (1, 4, image_size, image_size)


def test_where_an_encoder_takes_its_own_size_alone_that_is_told() -> None:
    with pytest.raises(InputError, match="give --image-size 224"):
        build_model("tu-efficientformer_l1", 4, image_size=128)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_in_a_pth_file_runs_no_code(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1), "bomb": Bomb(tmp_path / TOUCHED)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="no file of tensors"):
        build_model("resnet18", 4, encoder_weights=str(tmp_path / "weights.pth"))
    assert not (tmp_path / TOUCHED).exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / TOUCHED).exists()  # the bomb is a live one


@pytest.mark.parametrize("encoder", [RECIPE, "resnet18"])
def test_imagenet_weights_without_a_network_are_one_problem_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(socket, "create_connection", fail)
    with pytest.raises(InputError, match="--encoder-weights") as caught:
        build_model(encoder, 4, encoder_weights="imagenet")
    assert len(caught.value.problems) == 1
