import json
import random
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipelines.load import SpecError, load
from pipelines.schema import SCHEMA
from pipelines.spec import Pipeline
from pipelines.yamlfile import read_yaml
from tests.pipelines.fakes import FILE, edited

PROFILES = ("laptop", "h200x1", "h100x8", "h100x16")


def problems(path: Path, profile: str = "laptop", sets: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(path, profile, sets)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_shipped_file_loads_under_every_profile(profile: str) -> None:
    loaded = load(FILE, profile)
    assert loaded.base == FILE.parent
    assert bool(loaded.blanks) == (profile == "h100x16")


WRONG = [
    ("    data: dialogues\n", "    data: base\n",
     "stages.chat.data: 'base' makes checkpoint, but token_shards is needed here; "
     "stages that make one: corpus, dialogues"),
    ("    data: dialogues\n", "    data: corpus\n",
     "stages.chat.data: 'corpus' holds shards of format text, but chat is needed here; stages that make it: dialogues"),
    ("    start: base", "    start: bsae", "stages.chat.start: no stage 'bsae'; did you mean 'base'?"),
    ("    start: base", "    start: chat", "stages.chat.start: stages build on each other in a circle: chat -> chat"),
    ("    tokens: 11_200", "    tokns: 11_200", "stages.base.tokns: unknown key 'tokns'; did you mean 'tokens'?"),
    ("context: 2048}", "context: 2000}",
     "stages.base.model: context is 2000; attention tiles are 128 tokens, so use 2048"),
    ("context: 2048}", "contxt: 2048}", "stages.base.model.contxt: unknown key 'contxt'; did you mean 'context'?"),
    ("depth: 20, ", "depth: deep, ", "stages.base.model.depth: must be a valid integer"),
    ("    epochs: 1\n", "    epochs: '1'\n", "stages.chat.epochs: must be a number, but it is '1'; write it plainly"),
    ("    epochs: 1\n", "    epochs: true\n", "stages.chat.epochs: must be a number, but it is True; write it plainly"),
    ("    epochs: 1\n", "    epochs: .inf\n", "stages.chat.epochs: must be a finite number, but it is inf"),
    ("holdout: 0.001", "holdout: 0.5", "stages.corpus.holdout: must be less than or equal to 0.05, but it is 0.5"),
    ("    kind: sft", "    kind: sftt", "stages.chat.kind: unknown kind 'sftt'; did you mean 'sft'?"),
    ("    kind: sft\n", "", "stages.chat.kind: is missing; write one of tokenizer, tokenize"),
    ("    start: base\n", "", "stages.chat.start: is missing; write it"),
    ("      base.tokens: 2_400_000", "      bse.tokens: 3", "profiles.laptop.set.bse.tokens: no stage 'bse'; did you"),
    ("      base.tokens: 2_400_000", "      base.tokns: 3", "profiles.laptop.set.base.tokns: unknown key 'tokns'; did"),
    ("      base.tokens: 2_400_000", "      base.tokens: 3", "stages.base: tokens is 3, less than one batch of 4096"),
    ("      base.tokens: 2_400_000", "      base.tokens.x: 3", "set.base.tokens.x: stages.base.tokens is no mapping"),
    ("      base.tokens: 2_400_000", "      base: 3", "profiles.laptop.set.base: names a whole stage"),
    ("      corpus:     {workers: 64,", "      corpsu:     {workers: 64,",
     "profiles.h100x16.place.corpsu: no stage 'corpsu'; did you mean 'corpus'?"),
    ("workers: 64, cpus: 4}\n      dia", "wrkers: 64, cpus: 4}\n      dia",
     "profiles.h100x16.place.corpus.wrkers: unknown key 'wrkers'; did you mean 'workers'?"),
    ("seed: 1337 ", "seed: 1337\nseed: 2 ", "seed: given twice, first on line"),
    ("service: {model: bundle", "service: {model: base",
     "service.model: 'base' makes checkpoint, but bundle is needed here; stages that make one: bundle"),
    ("name: speedrun\n", "name: Speed Run\n", "name: "),
    ("  bundle:  ", "  bun-dle:  ", "stages.bun-dle: a stage's name is lower-case letters, digits and _"),
    ("  bundle:  ", "  place:  ", "stages.place: 'place' means something else in `place` and `--set`; choose another"),
    ("seed: 1337 ", "seed: &x 1337 ", "anchors are not used here; write the value out"),
    ("seed: 1337 ", "seed: !!python/name:os.system x ", "seed: the tag tag:yaml.org,2002:python/name:os.system"),
    ("seed: 1337 ", "seed: [1337 ", "not YAML: while parsing a flow sequence"),
    ("    store: s3://YOUR-BUCKET/nanochat", "    store: gs://bucket", "profiles.h100x16.store: store is 'gs://bucket'"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), WRONG)
def test_a_mistake_is_said_with_its_line_and_a_remedy(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = edited(tmp_path, (old, new))
    lines = problems(path)
    assert any(said in line for line in lines), lines
    assert all(line.startswith(f"{path}:") for line in lines)


def test_all_mistakes_are_said_at_once_each_with_its_own_line(tmp_path: Path) -> None:
    path = edited(
        tmp_path,
        ("seed: 1337 ", "seed: 1337\nseed: 2 "),
        ("    tokens: 11_200", "    tokns: 11_200"),
        ("    start: base", "    start: bsae"),
        ("    data: dialogues\n", "    data: base\n"),
        ("    kind: export", "    kind: exprt"),
        ("workers: 64, cpus: 4}\n      dia", "workers: yes, cpus: 4}\n      dia"),
        ("      chat.batch_tokens", "      chet.batch_tokens"),
    )
    text = path.read_text().splitlines()
    found = {line.split(": ")[1]: int(line.split(":")[1]) for line in problems(path)}
    marks = {
        "seed": "seed: 2",
        "stages.base.tokns": "tokns",
        "stages.chat.start": "bsae",
        "stages.chat.data": "    data: base",
        "stages.bundle.kind": "exprt",
        "profiles.h100x16.place.corpus.workers": "workers: yes",
        "profiles.laptop.set.chet.batch_tokens": "chet",
    }
    for dotted, mark in marks.items():
        assert mark in text[found[dotted] - 1], (dotted, found)


def test_wrong_sets_are_said_as_such() -> None:
    lines = problems(
        FILE,
        sets=(
            "base.tokns=3",
            "base",
            "place.base.workers=0",
            "serve.cpu=3",
            "base.model.depth=x",
            "x.y=1",
            "place.a=1",
        ),
    )
    said = "\n".join(lines)
    for part in (
        "--set: base.tokns: unknown key 'tokns'; did you mean 'tokens'?",
        "--set: base: has no value; write it as PATH=VALUE",
        "--set: place.base.workers: must be greater than 0, but it is 0",
        "--set: serve.cpu: unknown key 'cpu'; did you mean 'cpus'?",
        "--set: base.model.depth: must be a valid integer",
        "--set: x.y: no stage 'x'",
        "--set: place.a: name a stage and a field",
    ):
        assert part in said


def test_sets_change_what_they_name_and_nothing_else() -> None:
    loaded = load(
        FILE, "laptop", ["base.tokens=1_000_000", "place.base.workers=2", "serve.port=9000", "store=s3://b/p"]
    )
    plain = load(FILE, "laptop")
    assert loaded.pipeline.stages["base"].tokens == 1_000_000  # type: ignore[union-attr]
    assert loaded.pipeline.stages["corpus"] == plain.pipeline.stages["corpus"]
    assert loaded.profile.store == "s3://b/p"
    assert loaded.profile.serve.port == 9000
    assert loaded.profile.place["base"].workers == 2
    assert loaded.profile.place["base"].cpus == plain.profile.place["default"].cpus == 2
    assert loaded.profile.place["default"] == plain.profile.place["default"]


def test_a_set_can_fill_in_what_the_user_must_write() -> None:
    with pytest.raises(SpecError, match=r"speedrun.yaml:\d+: profiles.h100x16.store: still says .*--set store=VALUE"):
        load(FILE, "h100x16").filled()
    assert load(FILE, "h100x16", ["store=s3://mine/x"]).filled().profile.store == "s3://mine/x"


def test_an_unknown_profile_is_named_with_those_there_are() -> None:
    assert "no profile 'laptp'; did you mean 'laptop'?" in problems(FILE, "laptp")[0]
    assert "no profile 'mars'; there are laptop, h200x1, h100x8, h100x16" in problems(FILE, "mars")[0]


def test_two_vocabularies_do_not_mix(tmp_path: Path) -> None:
    path = edited(
        tmp_path,
        ("stages:\n", "stages:\n  other: {kind: tokenizer, encoding: r50k_base}\n"),
        (
            'tokenizer: vocabulary\n    source: "hf://datasets/HuggingFaceTB',
            'tokenizer: other\n    source: "hf://datasets/Hugging',
        ),
    )
    assert (
        "stages.chat: its inputs have different vocabularies (base with vocabulary, dialogues with other)"
        in "\n".join(problems(path))
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a pipeline file"),
        (b"- a\n- b\n", "not a pipeline file"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a: \x00", "not YAML"),
        (b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"a: " + b"9" * 5000, "a: not a number that can be used"),
        (b"? [a, b]\n: c\n", "a key must be a single word"),
        (b"name: x\n", "stages: is missing"),
        (b"profiles: 3\nstages: [1]\nname: {}\n", "no profile 'laptop'; there are none"),
    ],
)
def test_what_is_no_pipeline_file_at_all(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(content)
    assert said in "\n".join(problems(path))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in problems(tmp_path / "none.yaml")[0]
    assert "cannot be read" in problems(tmp_path)[0]


def mutated(text: str, dice: random.Random) -> str:
    bits = [
        "{", "}", "[", "]", ":", "- ", "\n", "&a ", "*a", "!x ", "? ", "null", "true", ".inf", "1e999", "~", "''", '"',
                    "stages:", "kind: ", "\t", "%", "|", ">", "-", "base", "9" * 4500]  # fmt: skip
    for _ in range(dice.randint(1, 4)):
        lines, at = text.split("\n"), dice.randrange(len(text))
        match dice.randrange(5):
            case 0:
                del lines[dice.randrange(len(lines))]
                text = "\n".join(lines)
            case 1:
                lines.insert(dice.randrange(len(lines)), dice.choice(lines))
                text = "\n".join(lines)
            case 2:
                text = text[:at] + dice.choice(bits) + text[at:]
            case 3:
                text = text[:at] + text[at + dice.randint(1, 9) :]
            case _:
                parts = text.split(" ")
                parts[dice.randrange(len(parts))] = dice.choice(parts + bits)
                text = " ".join(parts)
    return text


def test_no_file_leads_to_a_trace(tmp_path: Path) -> None:
    path, sets = (
        tmp_path / "p.yaml",
        [(), ("base.tokens=3",), ("place.x.y=1",), ("store=3",), ("serve.gpu=[]",), ("=",)],
    )
    loads = 0
    for seed in range(150):
        dice = random.Random(seed)
        path.write_text(mutated(FILE.read_text(), dice))
        try:
            load(path, dice.choice(PROFILES), dice.choice(sets))
            loads += 1
        except SpecError:
            pass
    assert 0 < loads < 150


def test_reading_and_planning_import_neither_torch_nor_ray_and_are_quick(tmp_path: Path) -> None:
    path = edited(tmp_path, ("    start: base", "    start: bsae"))
    code = (
        "import sys; from pathlib import Path; from pipelines.load import load, SpecError\n"
        "from pipelines.plan import plan\n"
        f"plan(load(Path({str(FILE)!r}), 'laptop'))\n"
        f"try: load(Path({str(path)!r}), 'laptop')\n"
        "except SpecError: pass\n"
        "else: raise SystemExit('the mistake was not seen')\n"
        "print([m for m in ('torch', 'ray', 'boto3', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FILE.parents[1], check=True)
    assert done.stdout.strip() == "[]"
    start = time.process_time()
    with pytest.raises(SpecError):
        load(path, "laptop")
    assert time.process_time() - start < 0.5  # all of it has a second, imports included


def test_python_and_yaml_say_the_same(tmp_path: Path) -> None:
    pipeline = load(FILE, "laptop").pipeline
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(pipeline.model_dump(mode="json")))
    assert load(path, "laptop").pipeline == pipeline == Pipeline(**pipeline.model_dump())


def test_the_schema_takes_the_shipped_file_as_any_editor_reads_it() -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    check.validate(read_yaml(FILE.read_text()).data)
    words = yaml.load(FILE.read_text().replace("32_768", "'32_768'"), Loader=yaml.SafeLoader)  # YAML 1.2: a word
    check.validate(words)
    words["stages"]["base"]["tokns"] = 3
    assert not check.is_valid(words)


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("2026-01-01", "2026-01-01"), ("1e-3", 0.001), ("32_768", 32768), ("1:30", "1:30"), ("0123", 123),
     ("~", None), ("True", True), ("-.inf", float("-inf")), ("1.5", 1.5), ("'1'", "1"), ("3e6", 3e6), ("1.2", 1.2)],
)  # fmt: skip
def test_plain_words(text: str, value: object) -> None:
    read = read_yaml(f"a: {text}")
    assert not read.problems
    assert read.data == {"a": value}
    assert type(read.data["a"]) is type(value)
