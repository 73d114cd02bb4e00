"""Models as folders: adapters that know their base, exports that plain transformers loads, errors of one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tigerbot import runner
from tigerbot.errors import InputError, ModelError
from tigerbot.listing import export_model, listed
from tigerbot.models import (
    PRESETS,
    add_lora,
    build,
    hub_folder,
    load_model,
    load_tokenizer,
    model_hash,
    parameter_count,
    save_model,
)
from tigerbot.runs import Run, write_json
from tigerbot.spec import Lora, parse_spec, spec_hash
from tigerbot_jobs.data.tokenizer import train_tokenizer

TEXTS = ["The fox sings. 狐狸唱歌。"] * 100


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    train_tokenizer(TEXTS, 512, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    return save_model(build("tiny", len(tokenizer), 1), tokenizer, folder / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = add_lora(load_model(base), Lora(rank=4))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    return save_model(model, load_tokenizer(base), tmp_path / "expert", base=base)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.arange(80, 100)[None]).logits


def test_an_export_gives_the_same_logits_in_plain_transformers(adapter: Path, tmp_path: Path) -> None:
    exported = export_model(adapter, tmp_path / "exported")

    plain = AutoModelForCausalLM.from_pretrained(exported)
    assert torch.allclose(logits(plain), logits(load_model(adapter)), atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert "<|assistant|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], tokenize=False, add_generation_prompt=True
    )
    with pytest.raises(InputError, match="is there already"):
        export_model(adapter, tmp_path / "exported")


def test_an_adapter_on_another_base_is_refused(adapter: Path, base: Path) -> None:
    weights = next(base.glob("*.safetensors"))
    kept = weights.read_bytes()
    save_model(build("tiny", len(load_tokenizer(base)), 2), load_tokenizer(base), base)

    with pytest.raises(ModelError, match="was made on another base"):
        load_model(adapter)

    weights.write_bytes(kept)
    assert load_model(adapter)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that is all there is: no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_model_is_found_in_the_cache_without_a_network(
    base: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hub_cache / "models--org--small"
    shutil.copytree(base, held / "snapshots/0123")
    (held / "refs").mkdir()
    (held / "refs/main").write_text("0123")
    seen: list[Run] = []
    monkeypatch.setattr(runner, "job_function", lambda kind: lambda run: seen.append(run) or run.finish({}))
    raw = {"kind": "train", "name": "tuned", "model": {"hub": "org/small"}, "data": {"train": [{"path": "t"}]}}
    spec = parse_spec(raw | {"train": {"tokens": 100}, "storage": {"uri": str(tmp_path)}})

    runner.run_spec(spec)

    (run,) = seen
    assert run.spec.model.hub is None and run.hash == spec_hash(spec)  # type: ignore[union-attr]
    assert torch.equal(logits(load_model(run.spec.model)), logits(load_model(base)))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["org/absent", "no/such/name", "~"])
def test_a_hub_model_that_cannot_be_had_is_one_line(name: str, hub_cache: Path) -> None:
    with pytest.raises(ModelError, match=r"give model\.path, or a cache") as refused:
        hub_folder(name)

    assert "\n" not in str(refused.value) and name in str(refused.value)


@pytest.mark.parametrize(("name", "billions"), [("tiny", 0.0026), ("60m", 0.058), ("7b", 6.7), ("180b", 180)])
def test_presets_have_the_size_they_are_named_for(name: str, billions: float) -> None:
    vocabulary = 4096 if name == "tiny" else 32_000

    assert parameter_count(name, vocabulary) / 1e9 == pytest.approx(billions, rel=0.1)
    assert set(PRESETS) == {"tiny", "60m", "1b", "7b", "180b"}


def test_what_is_no_model_is_said_in_one_line(tmp_path: Path) -> None:
    for load in (load_model, load_tokenizer, model_hash):
        with pytest.raises(ModelError) as refused:
            load(tmp_path)
        assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_runs_are_listed_with_their_state(tmp_path: Path) -> None:
    for name, state in (("a", {"status": "done", "result": {"loss": 0.5}}), ("b", {"status": "running"})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "spec.json", {"hash": "x", "spec": {"kind": "train"}})
        write_json(tmp_path / name / "state.json", state)

    found = {one.name: (one.kind, one.state, one.note) for one in listed(tmp_path)}

    assert found == {"a": ("train", "done", "loss 0.5"), "b": ("train", "interrupted", "")}
    with pytest.raises(InputError, match="there is no such folder"):
        listed(tmp_path / "nowhere")
