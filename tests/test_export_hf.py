"""tools/export_hf and tools/import_hf: the same function, the same ids, in the real transformers."""

import json
import lzma
import math
import shutil
import sys
import unicodedata
from dataclasses import asdict
from itertools import islice
from typing import get_args

import pytest
import tiktoken
import torch

from data.partial import VOCABULARY_FILE
from data.prepare import GPT2_PATTERN, load_tokenizer
from model import GPT, GPTConfig
from runtime.checkpoint import read_checkpoint, save_weights
from tests.conftest import PATIENCE, ROOT, VOCAB, assert_same_bits, fails_in_one_line, tiny_arguments
from train import TrainConfig

transformers = pytest.importorskip("transformers", reason="the Hugging Face export needs: pip install transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from tools import export_hf, import_hf, plot  # noqa: E402
from tools.sample import load_model  # noqa: E402

STDLIB = ROOT / "data/stdlib" / VOCABULARY_FILE
SOURCE = (ROOT / "train.py").read_text()


@pytest.fixture
def checkpoint(tmp_path):
    """Writes weights as a run could have left them, norms off one and μ far from zero; 4,096 tokens are the stdlib's."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "data").mkdir()
    meta = {"tokenizer": VOCABULARY_FILE, "vocab_size": 4096}
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    shutil.copy(STDLIB, tmp_path / "data")

    def make(name="weights.pt", **settings):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{"vocab_size": 4096, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64} | settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1, 0.3)
            model.unembedding.weight.add_(torch.randn(64))
        data = tmp_path / ("data" if model.config.vocab_size == 4096 else "raw")
        save_weights(tmp_path / name, model, asdict(TrainConfig(**asdict(model.config), data_dir=str(data))))
        return tmp_path / name

    return make


@torch.no_grad()
def all_logits(model: GPT, tokens):
    return torch.stack([model(tokens[:, : length + 1]) for length in range(tokens.shape[1])], dim=1)


def run_import(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["import_hf", *map(str, arguments)])
    import_hf.main()


# --- the function


@torch.no_grad()
def test_geometry_takes_the_logits_of_any_folder(checkpoint, tmp_path):
    """tools.plot --geometry: statistics of the folder's own logits, as stored and centred; none where it is no model."""
    export_hf.export(checkpoint(oec="none"), tmp_path / "out")
    stored, centred = plot.logit_statistics(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")((ROOT / "README.md").read_text())["input_ids"]
    logits = theirs(torch.tensor([words[:63]])).logits[0]  # all but the last of 64 positions
    assert stored["logit_mean"] == pytest.approx(logits.mean().item(), rel=1e-4)
    assert stored["logit_std"] == pytest.approx(logits.std(correction=0).item(), rel=1e-4)
    assert stored["logit_absmax"] == pytest.approx(logits.abs().max().item(), rel=1e-4)
    assert abs(centred["logit_mean"]) < 1e-5 < 0.1 < abs(stored["logit_mean"])
    (tmp_path / "out/tokenizer.json").unlink()
    (tmp_path / "out/config.json").write_text("{}")
    assert plot.logit_statistics(tmp_path / "out") == [{}, {}]


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("method", get_args(GPTConfig.__dataclass_fields__["oec"].type))
@torch.no_grad()
def test_logits_and_greedy_text_are_ours(checkpoint, tmp_path, method, tied):
    path = checkpoint(oec=method, tie_weights=tied)
    export_hf.export(path, tmp_path / "out")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs) is transformers.StableLmForCausalLM and not any(report.values()), report
    shared = theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert shared == theirs.config.tie_word_embeddings == (tied and method != "mu_centering")
    ours, _ = load_model(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([tokenizer(SOURCE[at:])["input_ids"][:64] for at in (0, 5000)])
    torch.testing.assert_close(theirs(tokens).logits, all_logits(ours, tokens), rtol=0, atol=1e-4)
    theirs.generation_config.eos_token_id = None  # ours goes on after the end of a text
    text = theirs.generate(tokens[:, :30], max_new_tokens=34, do_sample=False)
    assert torch.equal(text, ours.generate(tokens[:, :30], 34, temperature=0))
    if method == "mu_centering":
        assert theirs.lm_head.weight.mean(dim=0).abs().max() < 1e-6 < ours.unembedding.weight.mean(dim=0).abs().max()


def test_a_trained_run_with_padding_rows_and_no_known_tokenizer(data, tmp_path, train_here, capsys):
    trainer = train_here(tiny_arguments(data, tmp_path / "run", tie_weights=True))
    export_hf.export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert "no tokenizer" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.from_numpy(trainer.val_data.read([0, 1]))[:, :32]
    logits = theirs(tokens).logits.detach()
    assert logits.shape[-1] == VOCAB < trainer.config.padded_vocab_size
    torch.testing.assert_close(logits, all_logits(trainer.model.eval(), tokens), rtol=0, atol=1e-4)


# --- the tokenizer


def assert_same_ids(theirs, encoding, text):
    ids = encoding.encode(text, allowed_special="all")
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == encoding.decode(ids)


def odd_texts():
    yield from ("", " ", "<|endoftext|>", "a<|endoftext|>\n\n<|endoftext|> b", "<|endof", "1234567 12 3½ ²")
    yield from ("ÅÄÖ ﬁ 你好，世界 नमस्ते 👩‍👩‍👧‍👦 e\u0301 \u200f")
    yield from ("a" * 300, "\0\x7f\ufffd", " " * 500 + "x" + "\n" * 70)
    yield from ("I'll we'VE 'S it''s", "\r\n\r\n\t \t\n  x   \n", "\u00a0\u2003\u3000\x85\x1c\x0b x")
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    for first in range(0, len(assigned), 10_000):  # every character there is, between letters and spaces
        yield "".join(f"{c}a {c}" for c in assigned[first : first + 10_000])


def test_ids_of_the_stdlib_vocabulary(checkpoint, tmp_path):
    export_hf.export(checkpoint(), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id) == (4096, 4095, 4095)
    for text in (SOURCE, *odd_texts()):
        assert_same_ids(tokenizer, load_tokenizer(str(STDLIB)), text)


def test_ids_of_gpt2(shared, checkpoint, tmp_path):
    export_hf.export(checkpoint(vocab_size=50257), tmp_path / "out")  # where no meta.json names a tokenizer
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with lzma.open(shared / "corpus/docs.jsonl.xz") as lines:
        documents = [json.loads(line)["text"] for line in islice(lines, 0, 400, 20)]
    assert len(documents) == 20
    for text in (SOURCE, *documents, *odd_texts()):
        assert_same_ids(tokenizer, tiktoken.get_encoding("gpt2"), text)


# As the encodings of OpenAI's later models have them: possessive quantifiers, cased letters, ids with gaps between.
POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?"
    r"|\p{N}{1,3}|\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", (POSSESSIVE, CASED))
def test_ids_of_other_patterns_and_of_ids_with_gaps(tmp_path, pattern):
    ranks = load_tokenizer(str(STDLIB))._mergeable_ranks
    special_tokens = {"<|endoftext|>": 4100, "<|fim|>": 4200}
    encoding = tiktoken.Encoding("other", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
    for name, content in export_hf.tokenizer_files(encoding, 64).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a<|fim|> b<|endoftext|>", SOURCE, *odd_texts()):
        assert_same_ids(tokenizer, encoding, text)


def test_a_pattern_that_would_be_read_differently_is_refused(capsys):
    ranks = load_tokenizer(str(STDLIB))._mergeable_ranks
    pattern, special_tokens = r"\p{N}{1,2}+|" + GPT2_PATTERN, {"<|endoftext|>": 4095}
    encoding = tiktoken.Encoding("odd", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
    assert "odd cannot be exported" in fails_in_one_line(capsys, export_hf.tokenizer_files, encoding, 64)


# --- there and back


@pytest.mark.parametrize("tied", (False, True))
def test_weights_come_back_bit_for_bit(checkpoint, tmp_path, monkeypatch, tied):
    path = checkpoint(tie_weights=tied, vocab_size=300)
    export_hf.export(path, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    for folder in ("out", "saved"):
        run_import(monkeypatch, tmp_path / folder, tmp_path / f"{folder}.pt")
        before, after = (dict(read_checkpoint(p)["model"]) for p in (path, tmp_path / f"{folder}.pt"))
        for name in ("embedding.weight", "unembedding.weight"):
            assert not after[name][300:].any()
            before[name], after[name] = before[name][:300], after[name][:300]
        assert_same_bits(before, after)


def test_a_folded_model_comes_back_as_the_same_function(checkpoint, tmp_path, monkeypatch):
    path = checkpoint(tie_weights=True, oec="mu_centering")
    export_hf.export(path, tmp_path / "out")
    run_import(monkeypatch, tmp_path / "out", tmp_path / "back.pt", "--data_dir", tmp_path / "data")
    (ours, _), (back, _) = load_model(path), load_model(tmp_path / "back.pt")
    tokens = torch.randint(4096, (2, 64))
    assert not back.config.tie_weights and torch.equal(all_logits(ours, tokens), all_logits(back, tokens))
    export_hf.export(tmp_path / "back.pt", tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


# --- refusals


def test_export_refuses_in_one_line(checkpoint, tmp_path, capsys):
    path, out = checkpoint(), tmp_path / "out"
    alien, damaged, capped = tmp_path / "alien.pt", tmp_path / "damaged.pt", checkpoint("capped.pt", logit_softcap=30.0)
    torch.save({"weights": torch.zeros(3)}, alien)
    damaged.write_bytes(path.read_bytes()[:-100])
    cases = {alien: "not a whole checkpoint", damaged: "not a whole checkpoint", capped: "logit_softcap=30"}
    for bad, says in (cases | {tmp_path / "none": "none", tmp_path: "ckpt_"}).items():
        assert says in fails_in_one_line(capsys, export_hf.export, bad, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("mine")
    for taken in (tmp_path / "mine", tmp_path / "mine/notes"):
        assert "is there already" in fails_in_one_line(capsys, export_hf.export, path, taken)
    assert "cannot be written" in fails_in_one_line(capsys, export_hf.export, path, tmp_path / "mine/notes/out")
    assert (tmp_path / "mine/notes").read_text() == "mine"
    shutil.rmtree(tmp_path / "data")
    assert "is not there" in fails_in_one_line(capsys, export_hf.export, path, out)
    left = {"alien.pt", "damaged.pt", "capped.pt", "weights.pt", "mine", "raw"}
    assert {p.name for p in tmp_path.iterdir()} == left and [p.name for p in (tmp_path / "mine").iterdir()] == ["notes"]


def test_an_export_that_the_disk_refuses_leaves_nothing(checkpoint, tmp_path):
    """The largest file a process may write is limited in a process of its own, as a full disk would."""
    import resource
    import subprocess

    command = [sys.executable, "-m", "tools.export_hf", str(checkpoint()), str(tmp_path / "out")]
    before = set(tmp_path.iterdir())
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr, done.stderr
    assert set(tmp_path.iterdir()) == before


CONFIG_CHANGES = {
    "model_type": "llama", "num_key_value_heads": 2, "use_parallel_residual": True, "qk_layernorm": False, "use_qkv_bias": True,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "intermediate_size": 200, "hidden_size": 66, "num_hidden_layers": "two",
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}, "vocab_size": 299,
    "num_attention_heads": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_CHANGES)
def test_import_refuses_another_architecture(checkpoint, tmp_path, monkeypatch, capsys, name):
    export_hf.export(checkpoint(vocab_size=300), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    changed = CONFIG_CHANGES[name]
    if name == "rope_parameters":
        config["rope_theta"] = changed["rope_theta"]
    (tmp_path / "out/config.json").write_text(json.dumps(config | {name: changed}))
    message = fails_in_one_line(capsys, run_import, monkeypatch, tmp_path / "out", tmp_path / "back.pt")
    says = {
        "model_type": "llama", "hidden_size": "n_embd=66", "num_attention_heads": "num_key_value_heads=4",
        "vocab_size": "(299, 64)", "rope_parameters": "rope",
    }  # fmt: skip
    assert says.get(name, name) in message and not (tmp_path / "back.pt").exists()


def change(folder, name, make):
    weights = load_file(folder / "model.safetensors")
    weights[name] = make(weights.get(name))
    save_file({k: v for k, v in weights.items() if v is not None}, folder / "model.safetensors")


WEIGHT_CHANGES = {
    "model.layers.1.input_layernorm.bias": lambda bias: bias + 0.1,
    "model.layers.0.self_attn.q_layernorm.norms.2.weight": lambda weight: weight + 0.1,
    "model.layers.0.self_attn.q_proj.bias": lambda _: torch.zeros(64),
    "model.layers.0.mlp.up_proj.weight": lambda _: None,
    "model.layers.0.mlp.down_proj.weight": lambda weight: weight[:, 1:].contiguous(),
    "model.layers.2.mlp.up_proj.weight": lambda _: torch.ones(256, 64),
}


@pytest.mark.parametrize("name", WEIGHT_CHANGES)
def test_import_refuses_weights_it_has_no_place_for(checkpoint, tmp_path, monkeypatch, capsys, name):
    export_hf.export(checkpoint(vocab_size=300), tmp_path / "out")
    change(tmp_path / "out", name, WEIGHT_CHANGES[name])
    assert name in fails_in_one_line(capsys, run_import, monkeypatch, tmp_path / "out", tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


def test_import_refuses_bad_paths_and_damaged_files(checkpoint, tmp_path, monkeypatch, capsys):
    path, out, back = checkpoint(vocab_size=300), tmp_path / "out", tmp_path / "back.pt"
    export_hf.export(path, out)

    def refusal(*arguments):
        return fails_in_one_line(capsys, run_import, monkeypatch, *arguments)

    before = path.read_bytes()
    assert "is there already" in refusal(out, path) and path.read_bytes() == before
    assert "a run's own" in refusal(out, tmp_path / "ckpt_0000005.pt")
    assert "cannot be written" in refusal(out, path / "back.pt")
    assert "none/config.json" in refusal(tmp_path / "none", back)
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:-100])
    assert "model.safetensors cannot be read" in refusal(out, back)
    (out / "model.safetensors").unlink()
    assert "save_pretrained" in refusal(out, back)
    for text in ("", "[1, 2]", "{}"):
        (out / "config.json").write_text(text)
        assert "config.json cannot be read" in refusal(out, back)
    assert not back.exists()


# --- the evaluation harness


@pytest.mark.slow
def test_lm_eval_measures_what_we_do(checkpoint, tmp_path):
    """The likelihood of a local task's documents, each after an end-of-text."""
    lm_eval = pytest.importorskip("lm_eval", reason="this needs: pip install lm_eval[hf]")
    export_hf.export(path := checkpoint(oec="mu_centering"), tmp_path / "out")
    documents = [SOURCE[at : at + 100] for at in range(0, 2000, 100)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    task = {
        "task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}},
        "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    results = lm_eval.simple_evaluate("hf", f"pretrained={tmp_path / 'out'}", tasks=[task], device="cpu", batch_size=4)
    (ours, _), encoding, nats = load_model(path), load_tokenizer(str(STDLIB)), 0.0
    for text in documents:
        tokens = torch.tensor([[encoding.eot_token, *encoding.encode(text)]])
        assert tokens.shape[1] <= 65
        nats += torch.nn.functional.cross_entropy(all_logits(ours, tokens[:, :-1])[0], tokens[0, 1:], reduction="sum").item()
    expected = nats / math.log(2) / len("".join(documents).encode())
    assert results["results"]["local"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
