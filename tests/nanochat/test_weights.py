"""Weights read one at a time, against safetensors' own reader."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from nanochat.checkpoint import open_weights, save_model
from nanochat.files import Folder
from nanochat.weights import StoredWeights
from tests.nanochat.sizes import VOCAB, filled, small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_read_as_safetensors_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    files = Folder(tmp_path)
    save_model(files, filled(small(2)), dtype)
    expected = load((tmp_path / "model.safetensors").read_bytes())
    with open_weights(files) as (config, vocab_size, weights):
        assert (config, vocab_size) == (small(2), VOCAB)
        assert set(weights) == set(expected)
        assert len(weights) == len(expected)
        for name in reversed(list(weights)):  # in any order, and twice
            for _ in range(2):
                assert torch.equal(weights[name], expected[name]), name
                assert weights[name].dtype == dtype


def test_an_empty_tensor_and_metadata_are_no_trouble() -> None:
    data = save({"a": torch.zeros(0, 3), "b": torch.tensor(2.5)}, metadata={"format": "pt"})
    weights = StoredWeights(io.BytesIO(data))
    assert (weights["a"].shape, float(weights["b"])) == ((0, 3), 2.5)
    assert weights.shapes == {"a": (0, 3), "b": ()}


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        b"{}",
        json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]}}).encode(),
        json.dumps({"a": {"dtype": "pickle", "shape": [4], "data_offsets": [0, 16]}}).encode(),
        json.dumps(["a"]).encode(),
    ],
)
def test_what_is_no_safetensors_file_is_refused(header: bytes) -> None:
    data = len(header).to_bytes(8, "little") + header if header.startswith((b'{"', b"[")) else header
    with pytest.raises(ValueError, match="no safetensors file"):
        StoredWeights(io.BytesIO(data))


def test_weights_that_do_not_fit_their_config_are_named(tmp_path: Path) -> None:
    files = Folder(tmp_path)
    save_model(files, filled(small(2)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 62}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(61, 32\), not \(62, 32\)"), open_weights(files):
        pass


def test_a_file_that_ends_too_early_is_refused_when_it_is_read() -> None:
    weights = StoredWeights(io.BytesIO(save({"a": torch.zeros(8)})[:-1]))
    with pytest.raises(ValueError, match="a: the file ends before its 32 bytes do"):
        weights["a"]
