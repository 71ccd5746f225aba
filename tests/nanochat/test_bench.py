"""The benchmarks, with the smallest sizes they can have: what they print, and that each option does something."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from nanochat import checkpoint
from nanochat.bench import apart, decode, growth, measure, speed, train, trained, trainer
from nanochat.bench.setup import RandomWeights
from nanochat.config import ModelConfig
from nanochat.files import Folder
from nanochat.flops import matrix_parameters, parameters
from nanochat.model import GPT
from nanochat.tokenizer import SPECIAL, SPLIT, Vocabulary
from pipelines import cli
from tests.nanochat.sizes import small

KEYS = ["bench", "case", "unit", "value", "baseline", "baseline_value", "ratio", "runs", "min", "max"]
KEYS += ["commit", "machine"]
TRAIN = ("--depth", "1", "--steps", "1")
SIZES = ("--prompt", "20", "--new", "3", "--runs", "2", "--torch")
RANDOM = ("--depth", "1", "--head-dim", "16", "--vocabulary", "61")
DECODE = (*RANDOM, *SIZES, "--batch", "1", "3", "--prefill", "40", "--precision", "fp32")
CONFIG = ModelConfig(depth=1, context=512, head_dim=64)


class Here:
    """Stands for a Worker without its process, whose start takes seconds."""

    def __init__(self, made_by: Callable[[Any], object], setup: object) -> None:
        self.name, self.made = made_by.__name__, made_by(setup)

    def ask(self, method: str, *arguments: object) -> Any:
        return getattr(self.made, method)(*arguments)

    def cpu_seconds(self) -> None:
        return None

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        del self.made


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "BATCH_TOKENS", 512)
    monkeypatch.setattr(speed, "READ_BYTES", 1 << 20)
    for module in (apart, growth, speed, train, trained):
        monkeypatch.setattr(module, "Worker", Here)


class Bench:
    """Runs a benchmark in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, name: str, *options: str) -> str:
        assert {"train": train, "decode": decode}[name].main(["--threads", "1", *options]) == 0
        out, err = self.capture.readouterr()
        assert err == ""
        return out

    def rows(self, name: str, *options: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self(name, "--json", *options).splitlines()]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(capsys)


def check_shape(row: dict[str, Any], name: str, unit: str = "tokens/s") -> None:
    assert list(row)[: len(KEYS)] == KEYS
    assert (row["bench"], row["unit"]) == (name, unit)
    assert row["min"] <= row["value"] <= row["max"]
    assert row["machine"]["threads"] == 1
    assert row["machine"]["processor"]
    assert (row["machine"]["torch"], row["machine"]["cores"] > 0) == (torch.__version__, True)
    if row["baseline"] is None:
        assert (row["baseline_value"], row["ratio"]) == (None, None)
    else:
        gain = row["value"] / row["baseline_value"]
        assert row["ratio"] == pytest.approx(1 / gain if unit == "s" else gain)


def test_a_json_line_a_measurement(bench: Bench) -> None:
    [row] = bench.rows("train", *TRAIN, "--commit", "abc")
    check_shape(row, "train")
    assert (row["commit"], row["parameters"]) == ("abc", parameters(CONFIG, row["vocabulary"]))
    rows = bench.rows("decode", *DECODE, "--commit", "abc")
    cases = [f"depth 1, fp32, {what}" for what in ("batch 1", "batch 3", "prefill 40")]
    assert [row["case"] for row in rows] == cases
    config = ModelConfig(depth=1, context=128, head_dim=16)
    for row in rows:
        check_shape(row, "decode")
        assert (row["commit"], row["runs"], row["runner"]) == ("abc", 2, "TorchRunner")
        assert row["parameters"] == parameters(config, row["vocabulary"])
        assert row["peak_bytes"] > 50_000_000  # torch alone takes more
        assert 0 < row["ttft_s"] < 100


def test_the_bound_is_made_of_bytes_and_the_read_rate(bench: Bench) -> None:
    config = ModelConfig(depth=1, context=128, head_dim=16, kv_heads=2)
    for row in bench.rows("decode", *DECODE, "--kv-heads", "2", "--prefill", "0"):
        batch = row["batch"]
        assert row["text_tokens"] == 20 + 1 + 1  # prompt, first token, the mean of 0, 1 and 2
        keys = batch * 22 * 2 * config.depth * 2 * 16 * 4  # tokens, keys and values, layers, heads, size, fp32
        assert row["step_bytes"] == 4 * matrix_parameters(config, 61) + keys
        assert row["read_bytes_per_s"] == max(row["read_kernels"].values())
        assert row["bound_tokens_per_s"] == pytest.approx(batch * row["read_bytes_per_s"] / row["step_bytes"])
        assert row["bound_share"] == pytest.approx(row["value"] / row["bound_tokens_per_s"])


def test_options_decide_what_is_measured(bench: Bench) -> None:
    [row] = bench.rows("train", "--depth", "2", "--steps", "3", "--precision", "fp32")
    assert (row["case"], row["runs"], row["precision"], row["commit"]) == ("depth 2, fp32", 3, "fp32", None)
    assert row["peak_bytes"] > 4 * 4 * row["parameters"]  # weights, gradients and two moments of most
    options = ("--precision", "bf16", "int8", "--batch", "2", "--shared", "17", "--new", "5", "--step-tokens", "99")
    rows = bench.rows("decode", *DECODE, *options, "--prefill", "0", "--runs", "3")
    assert [(row["precision"], row["batch"], row["runs"]) for row in rows] == [("bf16", 2, 3), ("int8", 2, 3)]
    for row in rows:
        assert 16 / 20 <= row["cached_share"] <= 17 / 20
        assert (row["new_tokens"], row["shared_tokens"], row["step_tokens"]) == (5, 17, 99)
        assert row["times_bf16"] == pytest.approx(row["value"] / rows[0]["value"])


def test_first_requests_draw_while_the_last_are_read(bench: Bench) -> None:
    """4 tokens a step: two for the second prompt whenever the first draws; so it has had its last token for a while."""
    [row] = bench.rows("decode", *DECODE, "--batch", "2", "--step-tokens", "4", "--prefill", "0", "--runs", "1")
    assert row["text_tokens"] > 22
    assert row["preemptions"] == 0


def test_determinism_is_compared_with_its_absence(bench: Bench) -> None:
    rows = bench.rows("decode", *DECODE, "--deterministic")
    assert [(row["deterministic"], row["baseline"]) for row in rows] == [(True, "not deterministic")] * 3
    for row in rows:
        check_shape(row, "decode")
        assert row["baseline_deterministic"] is False


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_transformers_makes_the_same_tokens_from_the_same_weights(bench: Bench) -> None:
    rows = bench.rows("decode", *DECODE, "--batch", "3", "--against", "transformers")
    assert [row["case"] for row in rows] == ["depth 1, fp32, batch 3", "depth 1, fp32, prefill 40"]
    for row in rows:
        check_shape(row, "decode")
        tried = row["baseline_tried"]
        assert set(tried) == {"dynamic bf16", "static bf16", "dynamic fp32", "static fp32"}
        cache, precision = max(tried, key=tried.__getitem__).split()
        assert row["baseline_path"] == f"{cache} cache, {precision}"
        assert (row["baseline"], row["baseline_peak_bytes"] > 50_000_000) == ("transformers", True)
        if precision == "fp32":
            assert row["same_first_tokens"] == 1


def test_time_over_length_and_its_picture(bench: Bench, tmp_path: Path) -> None:
    lengths = ("--lengths", "30", "7", "--precision", "fp32", "bf16", "--plot", str(tmp_path / "plot.png"))
    rows = bench.rows("decode", *DECODE, *lengths)
    cases = [f"depth 1, {precision}, after {n} tokens" for precision in ("fp32", "bf16") for n in (7, 30)]
    assert [(row["case"], row["baseline"]) for row in rows] == [(case, "no cache") for case in cases]
    for row in rows:
        check_shape(row, "decode")
        assert row["uncached_time_per_token_s"] == pytest.approx(1 / row["baseline_value"])
        assert row["baseline_value"] != row["value"]  # not the same times twice
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    growth.main([str(tmp_path / "lines.json"), str(tmp_path / "later.png")])
    now, later = (matplotlib.image.imread(tmp_path / name) for name in ("plot.png", "later.png"))
    assert now.shape[1] > 500
    assert (now < 0.9).any(), "nothing is drawn"
    assert (now == later).all()


def test_start_and_other_tokens(bench: Bench) -> None:
    start, other = bench.rows("decode", *DECODE, "--start", "--mixed", "4", "--deterministic")
    check_shape(start, "decode", "s")
    check_shape(other, "decode", "share")
    assert 0 < start["value"] < 100
    assert (other["value"], other["greedy"], other["seeded"]) == (0, 0, 0)
    assert (other["batch"], other["requests"]) == (3, 4)


def test_a_chat_computes_each_token_once(bench: Bench) -> None:
    [row] = bench.rows("decode", *DECODE, "--turns", "4", "--prompt", "9", "--new", "5", "--context", "128")
    check_shape(row, "decode", "s")
    assert row["baseline"] == "turn 2"
    assert row["computed_tokens"] == [13, 14, 14, 14]  # an answer's last token is computed by the next turn
    assert len(row["ttft_s"]) == 4
    assert all(seconds > 0 for seconds in row["ttft_s"])


def test_replies_that_others_change_are_counted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crowded:
        """The likeliest token is the number of sequences in the step."""

        config, vocab_size, blocks, weight_bytes = ModelConfig(depth=1, context=128, head_dim=16), 61, 99, 1
        precision, deterministic, block_bytes = "fp32", False, 1

        def forward(self, batch: Any) -> torch.Tensor:
            return torch.eye(61)[len(batch.counts)].repeat(len(batch.wanted), 1)

    monkeypatch.setattr("nanochat.bench.ours.make_runner", lambda *_, **__: Crowded())
    [row] = bench.rows("decode", *DECODE, "--mixed", "3")
    assert row["greedy"] == 1


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Config, weights and vocabulary of a model whose tokens are bytes, and texts it has not seen."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    vocab = Vocabulary(SPLIT, ranks, {name: 256 + n for n, name in enumerate(SPECIAL)})
    model = GPT(small(2), vocab.size)
    model.load_state_dict(dict(RandomWeights(model.config, vocab.size)))
    folder = Folder(tmp_path / "bundle")
    checkpoint.save_model(folder, model)
    vocab.save(folder)
    return folder.root


def test_a_trained_model_in_each_precision(bench: Bench, bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Ünseen words. " * 30)
    fp32, bf16, int8 = bench.rows("decode", "--trained", str(bundle), "--text", str(text), *SIZES)
    assert [row["baseline"] for row in (fp32, bf16, int8)] == ["bf16"] * 3
    for row in (fp32, bf16, int8):
        check_shape(row, "decode")
        assert row["text_bytes"] == len(text.read_bytes())
        assert row["bits_per_byte_change"] == pytest.approx(row["bits_per_byte"] / bf16["bits_per_byte"] - 1)
    assert bf16["ratio"] == 1
    model = checkpoint.load_model(Folder(bundle), torch.float32)
    assert fp32["bits_per_byte"] == pytest.approx(slow_bits(model, text.read_bytes()), rel=1e-5)  # fp32: 24 bits
    assert bf16["bits_per_byte"] == pytest.approx(fp32["bits_per_byte"], rel=0.02)


def slow_bits(model: Any, text: bytes) -> float:
    """Bits per byte of the bytes after <|bos|>, context by context, from log-softmax in float64."""
    from nanochat.attention import Rows

    tokens, bits = torch.tensor([256, *text]), 0.0
    for at in range(0, len(text), model.config.context):
        piece = tokens[at : at + model.config.context + 1]
        with torch.no_grad():
            logits = model.logits(model(piece[None, :-1], Rows()))[0].double()
        bits -= float(logits.log_softmax(-1)[torch.arange(len(piece) - 1), piece[1:]].sum()) / 0.6931471805599453
    return bits / len(text)


@pytest.mark.parametrize(("name", "options"), [("train", TRAIN), ("decode", DECODE)])
def test_a_table_for_people(bench: Bench, name: str, options: Sequence[str]) -> None:
    machine, head, case, *_ = bench(name, *options).splitlines()
    assert f"torch {torch.__version__}" in machine
    assert head.split() == ["case", "median", "min", "max", "runs", "unit", "ratio"]
    assert case.startswith("depth 1")
    assert "tokens/s" in case


@pytest.mark.parametrize(("name", "options"), [("train", TRAIN), ("decode", (*DECODE[:-2], "--prefill", "0"))])
def test_bf16_where_the_processor_has_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, options: Sequence[str]
) -> None:
    for able in (False, True):
        monkeypatch.setattr(measure, "cpu_has_bf16", lambda able=able: able)
        assert bench.rows(name, *options)[0]["precision"] == ("bf16" if able else "fp32")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--depth", "0"), "'0' is not a whole number of 1 or more"),
        (("--shared", "-1"), "'-1' is not a whole number of 0 or more"),
        (("--threads", "many"), "'many' is not a whole number"),
        (("--precision", "fp16"), "invalid choice: 'fp16'"),
        (("--shared", "256"), "--shared is 256, but a prompt has 256 tokens; use less"),
        (("--context", "256"), "--context is 256, but the longest text here has 516 tokens"),
        (("--context", "1000"), "context is 1000; attention tiles are 128 tokens, so use 1024"),
        (("--kv-heads", "2"), "kv_heads is 2; 3 query heads can be shared by [1, 3]"),
        (("--step-tokens", "32"), "--step-tokens is 32; a step needs one token for each of 32 requests"),
        (("--plot", "p.png"), "--plot draws what --lengths measures"),
        (("--trained", "bundle"), "--trained needs --text"),
        (("--text", "a.txt"), "--text needs --trained"),
        (("--against", "transformers", "--start"), "leave out --trained, --lengths, --start, --mixed and --turns"),
        (("--turns", "1"), "--turns is 1; the last turn of a chat is compared with its second"),
        (("--trained", "no-such", "--text", "a.txt"), "No such file or directory: 'no-such/config.json'"),
        (("--trained", "no-such", "--text", "a.txt", "--kv-heads", "1"), "leave out --kv-heads"),
        pytest.param(
            ("--device", "cuda"),
            "torch finds no CUDA here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_a_wrong_option_is_refused(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        decode.main(options)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_trained_model_must_have_room(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decode.main(["--trained", str(bundle), "--text", __file__])
    assert "is 128 tokens, and this needs 290; use a smaller --prompt or --new" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "module"), [("--against", "transformers"), ("--plot", "matplotlib")])
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, module: str
) -> None:
    monkeypatch.setattr(decode, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        decode.main([option, "transformers", *(("--lengths", "9") if option == "--plot" else ())])
    assert f"{module} is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize(("dirty", "told"), [(False, "0a1b"), (True, "0a1b-dirty"), (None, None)])
def test_the_verb_passes_options_and_the_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dirty: bool | None, told: str | None
) -> None:
    monkeypatch.setattr(cli, "made_by", lambda: {"commit": None if dirty is None else "0a1b", "dirty": dirty})
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    assert cli.main(["bench", "train", *TRAIN, "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == told


def test_the_modules_run_by_themselves() -> None:
    """And with processes of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "nanochat.bench.train", "--help"], capture_output=True, text=True, check=True
    )
    assert "nanochat bench train" in done.stdout
    command = [sys.executable, "-m", "nanochat.bench.decode", *DECODE, "--lengths", "9", "--threads", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    check_shape(json.loads(done.stdout), "decode")
