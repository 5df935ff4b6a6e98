#!/usr/bin/env python3
"""`gemcut generate`: what must not change the text, what must, and every prompt or model that it has to refuse.

    generate.py GEMCUT MODEL      MODEL: data/model/gemma3-tiny
"""
import json
import pathlib
import shutil
import sys

from model import Tests, run

GEMCUT, MODEL = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
PROMPT = "The old house by the river"
GREEDY = ("--temperature", 0)
times = {"prefill_seconds": 0, "decode_seconds": 0}
tests = Tests("gemcut-generate-")
CUT = tests.folder / "cut"
tests.need(GEMCUT, "quantize", MODEL, CUT, "-q", "--method", "rtn")


def generate(*options, model=MODEL, prompt=PROMPT):
    """-> the JSON report"""
    code, stdout, stderr = run(GEMCUT, "generate", model, "-p", prompt, "--json", *options)
    assert code == 0, f"exit {code}: {stderr or stdout}"
    report = json.loads(stdout)             # one document and nothing after it
    assert report["new_tokens"] == len(report["tokens"]), report
    return report


def printed(*options, model=MODEL, prompt=PROMPT):
    """-> (stdout, stderr)"""
    code, stdout, stderr = run(GEMCUT, "generate", model, "-p", prompt, *options)
    assert code == 0, f"exit {code}: {stderr}"
    return stdout, stderr


def refused(*options, code=3, words=(), model=MODEL, prompt=PROMPT):
    """One line on stderr that holds all the words, and not a word of text."""
    prompt = () if prompt is None else ("-p", prompt)
    got, stdout, stderr = run(GEMCUT, "generate", model, *prompt, *options)
    assert got == code, f"exit {got}, expected {code}: {stderr.strip()}"
    assert stdout == "" and stderr.startswith("gemcut") and stderr.count("\n") == 1, (stdout, stderr)
    for word in words:
        assert str(word) in stderr, f"{word!r} is not in: {stderr.strip()}"


def copy(tmp, file, change):
    """A copy of the model; change(document) alters a JSON file of it."""
    folder = tmp / "m"
    shutil.copytree(MODEL, folder)
    document = json.loads((folder / file).read_text())
    change(document)
    (folder / file).write_text(json.dumps(document))
    return folder


def settings(tmp, **values):
    return copy(tmp, "config.json", lambda config: config.update(values))


def ids(report):
    return [t["id"] for t in report["tokens"]]


@tests.case
def threads_change_nothing(tmp):
    long = PROMPT * 100                     # beyond one piece of prefill
    for model in (MODEL, CUT):
        for options in (GREEDY, ("--seed", 7)):
            for prompt in (PROMPT, long):
                one, two, three = (generate("--threads", n, "-n", 48, *options, model=model, prompt=prompt)
                                   for n in (1, 2, 3))
                assert one["tokens"] == two["tokens"] == three["tokens"], f"{model.name} {options} {one} {two}"
                assert one["prompt_tokens"] > (512 if prompt is long else 0), one["prompt_tokens"]


@tests.case
def seeds(tmp):
    for model in (MODEL, CUT):
        texts = [printed("--seed", seed, "-n", 32, model=model)[0] for seed in (1, 1, 2, 3)]
        assert texts[0] == texts[1], texts
        assert len(set(texts[1:])) == 3, texts


@tests.case
def greedy_in_every_way(tmp):
    best = ids(generate("-n", 24, *GREEDY))
    for options in (("--top-k", 1), ("--top-p", 0), ("--temperature", 1e-6, "--top-k", 0, "--top-p", 1)):
        got = ids(generate("-n", 24, "--seed", 5, *options))
        assert got == best, f"{options}: {got}, expected {best}"


@tests.case
def json_and_print_agree(tmp):
    report = generate("-n", 40, "--seed", 3)
    assert printed("-n", 40, "--seed", 3)[0] == report["text"] + "\n", report["text"]
    assert report["seed"] == 3 and report["end"] == "length" and report["new_tokens"] == 40, report
    assert all(t["log_probability"] <= 0 for t in report["tokens"])


@tests.case
def empty_prompt(tmp):
    report = generate("-n", 8, *GREEDY, prompt="")
    assert report["prompt_tokens"] == 1 and report["new_tokens"] == 8, report


@tests.case
def no_tokens(tmp):
    report = generate("-n", 0)
    assert (report["text"], report["new_tokens"], report["end"]) == ("", 0, "length"), report
    assert printed("-n", 0)[0] == "\n"


@tests.case
def prompt_from_file(tmp):
    (tmp / "prompt").write_text(PROMPT)
    code, stdout, stderr = run(GEMCUT, "generate", MODEL, "--file", tmp / "prompt", "-n", 8, "--json", *GREEDY)
    assert code == 0 and ids(json.loads(stdout)) == ids(generate("-n", 8, *GREEDY)), (stdout, stderr)
    refused("--file", tmp / "prompt", code=2, words=["--prompt", "--file"])
    refused("--file", tmp / "none", prompt=None, words=["none", "No such file"])
    refused(prompt=None, code=2, words=["--prompt", "--file"])


@tests.case
def prompt_beyond_context(tmp):
    prompt = "word " * 3000
    folder = settings(tmp, max_position_embeddings=100000)
    refused(code=2, prompt=prompt, words=[generate("-n", 0, model=folder, prompt=prompt)["prompt_tokens"], 2048])


@tests.case
def context_fills_up(tmp):
    folder = settings(tmp, max_position_embeddings=32)
    report = generate("--ignore-eos", *GREEDY, model=folder)
    # the token after the last position is known, and is never fed
    assert report["end"] == "context full" and report["prompt_tokens"] + report["new_tokens"] == 33, report
    assert ids(report) == ids(generate("--ignore-eos", "-n", report["new_tokens"], *GREEDY)), "the context changed it"
    assert printed("--ignore-eos", model=folder)[1].rstrip().endswith("context full")
    refused(model=folder, prompt="word " * 40, code=2, words=["32"])


@tests.case
def end_of_text_at_once(tmp):
    first = ids(generate("-n", 1, *GREEDY))[0]
    for given in (first, [5, first]):
        folder = copy(tmp / str(given), "generation_config.json", lambda c: c.update(eos_token_id=given))
        report = generate(*GREEDY, model=folder)
        assert (report["text"], report["new_tokens"], report["end"]) == ("", 0, "end of text"), report
        assert printed(*GREEDY, model=folder)[0] == "\n"
        on = generate("-n", 8, "--ignore-eos", *GREEDY, model=folder)
        assert ids(on)[0] == first and on["new_tokens"] == 8, on


@tests.case
def end_of_text_from_config(tmp):
    first = ids(generate("-n", 1, *GREEDY))[0]
    folder = settings(tmp, eos_token_id=first)
    (folder / "generation_config.json").unlink()
    assert generate(*GREEDY, model=folder)["end"] == "end of text"


@tests.case
def end_of_text_by_default(tmp):
    """Where no file names one it is 1, which every Gemma's <eos> is."""
    folder = settings(tmp, eos_token_id=None)
    (folder / "generation_config.json").unlink()
    seeds = [generate("-n", 300, "--seed", seed, model=folder) for seed in range(8)]
    assert any(r["end"] == "end of text" for r in seeds) and all(1 not in ids(r) for r in seeds), seeds


@tests.case
def sampling_by_the_model(tmp):
    """What generation_config.json says holds where the command line says nothing."""
    def chosen(*options, **values):
        folder = tmp / "m"
        shutil.rmtree(folder, ignore_errors=True)
        copy(tmp, "generation_config.json", lambda c: c.update(values))
        return generate("-n", 12, *options, model=folder)

    def settings_of(report):
        return report["temperature"], report["top_k"], report["top_p"]
    assert settings_of(chosen()) == (1, 64, 0.95), "what Gemma 3 and 4 ship"
    assert settings_of(chosen(temperature=None, top_k=None, top_p=None)) == (1, 64, 0.95)
    report = chosen("--seed", 4, temperature=0.5, top_k=3, top_p=0.75, do_sample=True)
    assert settings_of(report) == (0.5, 3, 0.75), report
    given = "--temperature", 0.5, "--top-k", 3, "--top-p", 0.75
    assert ids(report) == ids(generate("-n", 12, "--seed", 4, *given)), report
    best = ids(generate("-n", 12, *GREEDY))
    assert ids(chosen(temperature=0)) == ids(chosen(do_sample=False, temperature=0.7)) == best
    assert settings_of(chosen("--top-k", 0, "--temperature", 2, top_k=3, do_sample=False)) == (2, 0, 0.95)
    for values in ({"temperature": -1}, {"temperature": "hot"}, {"top_k": -1}, {"top_k": 2.5}, {"top_p": 1.5},
                   {"do_sample": 1}):
        shutil.rmtree(tmp / "m")
        folder = copy(tmp, "generation_config.json", lambda c: c.update(values))
        refused(model=folder, words=["generation_config.json", *values])


@tests.case
def tokenizer_without_bos(tmp):
    """Gemma 4's post-processor adds no <bos>: every command puts one there all the same."""
    def change(t):
        t["post_processor"] = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
                               "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
    folder = copy(tmp, "tokenizer.json", change)
    text = tmp / "text.txt"
    text.write_text(f"{PROMPT} " * 60)
    for options in ((), ("--chat",)):
        assert generate("-n", 6, *GREEDY, *options, model=folder) | times == \
            generate("-n", 6, *GREEDY, *options) | times, options
    assert generate("-n", 0, model=folder, prompt="")["prompt_tokens"] == 1
    for command in (("calib", text, "--samples", 2, "--length", 32, "--model"),
                    ("eval", "--text", text, "--length", 64, "--windows", 2)):
        own, theirs = (json.loads(run(GEMCUT, *command, model, "--json")[1]) for model in (folder, MODEL))
        for key in ("hash", "perplexity", "tokens"):
            assert own.get(key) == theirs.get(key), (command, own, theirs)
        assert {"hash", "perplexity"} & own.keys(), own


@tests.case
def chat_of_the_next_gemma(tmp):
    """A tokenizer with Gemma 4's control tokens is spoken to in Gemma 4's turns."""
    def change(t):
        text = json.dumps(t).replace("<start_of_turn>", "<|turn>").replace("<end_of_turn>", "<turn|>")
        t.update(json.loads(text))
    folder = copy(tmp, "tokenizer.json", change)
    by_hand = f"<|turn>system\nBe brief.<turn|>\n<|turn>user\n{PROMPT}<turn|>\n<|turn>model\n"
    chat = generate("-n", 4, "--chat", "--system", " Be brief. ", model=folder)
    assert generate("-n", 4, model=folder, prompt=by_hand)["tokens"] == chat["tokens"], "not the template of Gemma 4"
    refused("--chat", model=copy(tmp / "n", "tokenizer.json", lambda t: t.update(
        json.loads(json.dumps(t).replace("_of_turn>", ">")))), words=["no <start_of_turn>", "no chat format"])


@tests.case
def token_beyond_vocabulary(tmp):
    folder = copy(tmp, "tokenizer.json", lambda t: t["added_tokens"].append(
        t["added_tokens"][0] | {"id": 5000, "content": "<beyond>"}))
    refused(model=folder, prompt="a <beyond> b", words=["token 5000", "2048"])
    assert ids(generate("-n", 4, *GREEDY, model=folder)) == ids(generate("-n", 4, *GREEDY)), "an id that is not used"


@tests.case
def chat_and_images(tmp):
    plain, turn = generate("-n", 4), generate("-n", 4, "--chat")
    system = generate("-n", 4, "--chat", "--system", "Be brief.")
    assert plain["prompt_tokens"] < turn["prompt_tokens"] < system["prompt_tokens"]
    by_hand = f"<start_of_turn>user\n{PROMPT}<end_of_turn>\n<start_of_turn>model\n"
    assert generate("-n", 4, prompt=by_hand)["tokens"] == turn["tokens"], "not the template of Gemma 3"
    refused("--system", "Be brief.", code=2, words=["--chat"])
    refused("--chat", "--image", "cat.png", words=["images are not supported"])


@tests.case
def tokenizer_missing_or_damaged(tmp):
    folder = copy(tmp, "tokenizer.json", lambda t: None)
    file = folder / "tokenizer.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(model=folder, words=["tokenizer.json", "not JSON"])
    file.write_bytes(whole.replace(b'"BPE"', b'"Unigram"'))
    refused(model=folder, words=["tokenizer.json", "Unigram"])
    file.unlink()
    refused(model=folder, words=["tokenizer.json", "No such file"])


@tests.case
def errors_as_json(tmp):
    code, stdout, _ = run(GEMCUT, "generate", MODEL, "-p", "word " * 3000, "--json")
    assert code == 2 and "2048" in json.dumps(json.loads(stdout)), (code, stdout)


sys.exit(tests.finish())
