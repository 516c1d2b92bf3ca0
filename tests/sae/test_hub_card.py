"""The model card: what is known is in it, nothing else is, and no text breaks it."""

import builtins
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml

from mlxterp.sae.hub_card import figure, model_card, public_name
from mlxterp.sae.metadata import Metadata, Statistics
from tests.sae import kinds
from tests.sae.test_hub import coder as of_demo

NASTY = '**b** <img src=x> | `code` [x](http://a)\n---\nlicense: "evil\u202e" ]]>'


def known(kind: str = "sae"):
    coder = kinds.make(kind)
    coder.metadata = Metadata(
        model={"name": "org/Some-Model-1B", "n_layers": 16, "d_model": 2048, "dtype": "bfloat16",
               "quantization": None, "fingerprint": "0123456789abcdef"},
        data={"training_tokens": 1234567, "validation_tokens": 4321, "documents": None,
              "context_length": 256},
        config={"k": 4, "learning_rate": 3e-4, "target_l0": None, "matryoshka_prefixes": []},
        library_version="0.1.0",
    )  # fmt: skip
    coder.statistics = Statistics(
        ({"step": 1, "tokens": 10, "loss": 9.0, "fvu": 0.9, "l0": 4.0, "dead": 0.0},
         {"step": 2, "tokens": 20, "loss": 0.5, "fvu": 0.25, "l0": 4.0, "dead": 0.1}),
        ({"step": 2, "tokens": 20, "fvu": 0.3125, "l0": 4.25, "dead": 0.1},),
        np.array([0.0] * 3 + [0.1] * (coder.n_features - 3)),
    )  # fmt: skip
    return coder


def front(text: str) -> dict:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return yaml.safe_load(found[1])


def sections(text: str) -> dict[str, str]:
    return {part.split("\n", 1)[0]: part for part in text.split("\n## ")[1:]}


def test_front_matter_names_library_model_and_kind():
    assert front(known().model_card("user/x", license="apache-2.0")) == {
        "library_name": "mlxterp",
        "license": "apache-2.0",
        "base_model": "org/Some-Model-1B",
        "tags": ["sparse-autoencoder", "interpretability", "mlx"],
    }
    for kind, tag in (("transcoder", "transcoder"), ("crosscoder", "crosscoder"),
                      ("cross-layer transcoder", "cross-layer-transcoder")):  # fmt: skip
        assert front(model_card(known(kind), "user/x"))["tags"][0] == tag


def test_what_is_known_is_in_the_card():
    text = model_card(known(), "user/x", figure="training.png")
    assert "\n# SAE of in.0 of org/Some-Model-1B\n" in text
    found = sections(text)
    numbers = (
        "| FVU | 0.2500 | 0.3125 |\n| L0 | 4.0 | 4.2 |\n| dead | 10.0% |  |\n| loss | 0.5 |  |"
    )
    assert numbers in found["Numbers"] and "](training.png)" in found["Numbers"]
    for row in (
        "features | 30", "activation function | topk, k = 4", "reads | `in.0` (width 6)",
        "features that never fired | 3",
    ):  # fmt: skip
        assert f"| {row} |" in found["Coder"]
    assert "writes" not in found["Coder"]
    assert "| tokens, training | 1,234,567 |" in found["Data"] and "documents" not in found["Data"]
    for row in ("| layers | 16 |", "| type of the weights | bfloat16 |"):
        assert row in found["Language model"]
    assert "| `learning_rate` | 0.0003 |" in found["Configuration"]
    assert "quantisation" not in text and "target_l0" not in text and "prefixes" not in text
    assert "Source" not in found and "Labelled features" not in found


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_nothing_is_said_of_what_is_not_known(kind):
    text = model_card(kinds.make(kind), "user/x")
    assert front(text).keys() == {"library_name", "tags"}
    assert sections(text).keys() == {"Use", "Coder"}
    assert "](" not in text and "None" not in text and "nan" not in text


def test_the_site_and_what_is_written_are_named_of_every_kind():
    text = model_card(known("transcoder"), "user/x")
    reads, writes = (getattr(known("transcoder"), end).names[0] for end in ("reads", "writes"))
    assert f"| writes | `{writes}` (width" in text and f"| reads | `{reads}` (width" in text
    assert f"# Transcoder of {reads} to {writes} of" in text
    assert "# Crosscoder of 2 sites of" in model_card(known("crosscoder"), "user/x")


def test_labels_are_in_the_card_best_first():
    coder = known()
    coder.labels.set(12, "names_of_people")
    coder.labels.set(7, "numbers")
    found = sections(model_card(coder, "user/x"))["Labelled features"]
    assert "Labels of 2 of 30 features" in found
    rows = re.findall(r"^\| +(\d+) +(.+?) \|", found, re.MULTILINE)
    assert rows == [("7", "numbers"), ("12", "names_of_people")]


def test_no_text_is_taken_for_markdown_html_or_yaml():
    coder = known()
    coder.labels.set(7, NASTY)
    coder.metadata = replace(
        coder.metadata,
        model={**coder.metadata.model, "name": NASTY, NASTY: NASTY},
        config={NASTY: NASTY, "k": [NASTY]},
        data={NASTY: NASTY},
        source={"format": NASTY},
        library_version=NASTY,
    )
    text = model_card(coder, "user/x", license=NASTY)
    assert front(text)["license"] == NASTY and "base_model" not in front(text)
    body = text.split("\n---\n", 1)[1]
    for markup in ("<img", "**b**", "`code`", "[x](", "\n---", "\nlicense", "\u202e", "]]>"):
        assert markup not in body, markup
    for table in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


@pytest.mark.parametrize("options", [{}, {"revision": "v1"}, {"subfolder": "a/b"}])
def test_the_code_of_the_card_runs(options, hub, capsys):
    assert 'InterpretableModel("org/Some-Model-1B")' in model_card(known(), "user/x", **options)
    coder = of_demo()
    coder.push_to_hub("user/x", **options)
    name = f"{options['subfolder']}/README.md" if "subfolder" in options else "README.md"
    repository = hub.repositories["user/x"]
    card = repository.commits[repository.branches[options.get("revision", "main")]][name].decode()
    assert card == coder.model_card("user/x", **options)
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert "'rance'" in capsys.readouterr().out


def test_without_the_model_the_code_only_loads(hub, capsys):
    coder = kinds.make("sae")
    coder.push_to_hub("user/x")
    card = hub.repositories["user/x"].files["README.md"].decode()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip() == repr(coder)


def test_a_local_model_is_named_without_its_directories(tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("models/llama") == "llama"
    assert public_name("/home/me/models/llama/") == "llama"
    assert public_name("C:\\models\\llama") == "llama"
    assert public_name("~/llama") == "llama"
    assert public_name("org/Llama-3.2-1B") == "org/Llama-3.2-1B"
    assert public_name("demo") == "demo" and public_name(None) == ""


def test_the_figure_is_of_the_training_or_of_the_rates_or_there_is_none(monkeypatch):
    coder = known()
    assert len(figure(coder).axes) == 4
    coder.statistics = replace(coder.statistics, training=({"step": 1, "fvu": 0.5},))
    assert len(figure(coder).axes) == 1
    assert figure(kinds.make("sae")) is None
    plain = builtins.__import__

    def without_matplotlib(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert figure(known()) is None
