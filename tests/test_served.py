"""served.py: answers of a server are those of its model, and what a server can do wrong is one line."""
import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import served_stub
import torch
from chat import fast
from served_stub import MODEL, margin, serve, slow
from test_layout import ROOT

import judge
from data.bank import Bank
from data.pictures import save_png
from judge import SCHEMES
from models import served
from models.families import CLIP, SYSTEM
from models.served import ServedJudge
from relations import MODALITIES, NAMES, draw_markers
from runtime.weights import read_spec

PAGE = (ROOT / "docs" / "judges.md").read_text()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(served, "PAUSES", (0, 0.01, 0.02))


def draw(photos=2, pairs=3, size=32, seed=0):
    """Photos of 8-bit colours and pairs of points."""
    rng = torch.Generator().manual_seed(seed)
    rgb = torch.randint(0, 256, (photos, 3, size, size), generator=rng) / 255
    return rgb, torch.randint(0, size, (photos, pairs, 2, 2), generator=rng)


def expected(rgb, pts):
    """Probabilities (B, P, M) of the stub's answers about the marked photos."""
    marked = (draw_markers(rgb, pts) * 255).round().byte()
    return torch.tensor([[[margin(picture.permute(1, 2, 0).numpy(), m) for m in NAMES] for picture in row]
                         for row in marked]).sigmoid()


# the address ------------------------------------------------------------------------------------------------------

def test_an_address_names_model_size_and_family():
    one = ServedJudge("http://localhost:8000/v1#org/judge,size=448,family=internvl")
    assert (one.model, one.size, one.grid, one.system) == ("org/judge", 448, 1, SYSTEM)
    assert one.server.url == "http://localhost:8000"
    other = ServedJudge("https://a.b/prefix/#judge.gguf")
    assert (other.model, other.size, other.system, other.server.url) == ("judge.gguf", 512, "", "https://a.b/prefix")


@pytest.mark.parametrize("spec, says", [
    ("http://localhost:8000", "want http://HOST:PORT#MODEL"), ("http://#a", "want http://"),
    ("http://user:secret@host#a", "want http://"), ("http://h#a,size=1", "32 to 4096 px"),
    ("http://h#a,size=big", "32 to 4096 px"), ("http://h#a,colour=1", "want http://"),
    ("http://h#a,family=bert", "want one of internvl"), ("http://h/#", "want http://")])
def test_an_address_that_is_none_is_refused_in_one_line(spec, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        judge.open_judge(spec)


def test_pages_of_the_hub_are_no_servers():
    for spec in ("http://node7:8000#org/judge", "https://judge.lab.org/v1#a,size=448"):
        assert read_spec(spec, SCHEMES).scheme and read_spec(spec, SCHEMES).place == spec
    assert all(not read_spec(spec, SCHEMES).scheme for spec in ("https://huggingface.co/org/judge", "org/judge", ROOT))


def test_the_digest_is_of_model_prompt_and_size_and_not_of_the_address():
    """It needs no server: a bank that is full is read without one."""
    digest = judge.open_judge("http://127.0.0.1:1#org/judge").digest()
    assert "cannot be hashed" in digest and "remove the bank" in digest
    assert digest == judge.load_judge("https://elsewhere/v1#org/judge,size=512").digest()
    others = {judge.open_judge(f"http://h#{rest}").digest()
              for rest in ("org/other", "org/judge,size=448", "org/judge,family=internvl")}
    assert len(others | {digest}) == 4


# answers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["vllm", "old vllm", "llama.cpp", "sglang"])
def test_chat_answers_are_the_probabilities_of_the_two_words_about_the_marked_photo(kind):
    rgb, pts = draw()
    with serve(kind) as stub:
        prob = judge.open_judge(stub.spec).ask(rgb, pts)
    torch.testing.assert_close(prob, expected(rgb, pts), atol=1e-6, rtol=0)


def test_the_prompt_is_the_official_question_and_the_beginning_of_its_answer():
    rgb, pts = draw(1, 1)
    with serve("vllm") as stub:
        ServedJudge(f"{stub.spec},family=internvl").ask(rgb, pts)
        bodies = stub.bodies[len(NAMES):]                                       # after those about a grey picture
    for body, m in zip(bodies, MODALITIES.values(), strict=True):
        system, user, *assistant = body["messages"]
        assert system == dict(role="system", content=SYSTEM) and body["max_tokens"] == 1 and body["model"] == MODEL
        assert user["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        assert user["content"][1] == dict(type="text", text=m.question)
        assert [turn["content"] for turn in assistant] == ([m.prefix] if m.prefix else [])
        assert body["continue_final_message"] == bool(m.prefix) != body["add_generation_prompt"]


def test_only_what_is_wanted_is_asked():
    rgb, pts = draw(1, 4)
    with serve("sglang") as stub:
        one = judge.open_judge(stub.spec)
        prob = one.ask(rgb, pts, modalities=("albedo", "depth"))
        assert len(stub.bodies) == 2 + 8
        assert one.ask(rgb[:0], pts[:0]).shape == (0, 4, len(NAMES)) and one.ask(rgb, pts, modalities=()).isnan().all()
        assert len(stub.bodies) == 2 + 8
    known = torch.tensor([m in ("albedo", "depth") for m in NAMES])
    assert prob[..., ~known].isnan().all()
    torch.testing.assert_close(prob[..., known], expected(rgb, pts)[..., known], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp", "sglang"])
@pytest.mark.parametrize("word", [" red", " green"])
def test_a_word_that_is_missing_is_not_known_and_never_0(kind, word):
    rgb, pts = draw(1, 2)
    with serve(kind) as stub:
        one = judge.open_judge(stub.spec)
        one.ask(rgb, pts)
        stub.lacks = (word,)
        prob = one.ask(rgb, pts)
    albedo = NAMES.index("albedo")
    assert prob.isnan().sum() == 2 * (len(NAMES) - 1)
    torch.testing.assert_close(prob[..., albedo], expected(rgb, pts)[..., albedo], atol=1e-6, rtol=0)


def test_points_outside_and_photos_of_another_size_are_refused():
    one = ServedJudge("http://127.0.0.1:1#a,size=32")
    with pytest.raises(ValueError, match=r"want \(B, 3, 32, 32\)"):
        one.ask(torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="0 <= row < 32"):
        one.ask(torch.rand(1, 3, 32, 32), torch.full((1, 1, 2, 2), 32))


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(served.KEY, "s3cret")
    with serve("vllm") as stub:
        judge.open_judge(stub.spec).ask(*draw(1, 1))
        assert stub.keys == {"Bearer s3cret"}


def test_a_command_asks_a_server(tmp_path, capsys):
    photo = save_png(tmp_path / "a.png", draw(1)[0][0].numpy())
    with serve("vllm") as stub:
        judge.main([str(photo), "--red", "4", "5", "--green", "20", "21", "--model", stub.spec])
    assert re.fullmatch(r"depth: .*the (red|green) point appears closer to the camera\. \(p = 0\.\d+\)\n",
                        capsys.readouterr().out)


# what goes wrong --------------------------------------------------------------------------------------------------

def refused(stub, says):
    """Ask a stub; it must be refused in one line that names it and holds a text."""
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        judge.open_judge(stub.spec).ask(*draw(1, 3))
    text = str(caught.value)
    assert "\n" not in text and f"127.0.0.1:{stub.server_address[1]}" in text and "want" in text


@pytest.mark.parametrize("kind, says", [
    ("other", "it serves no models"), ("models", "got neither POST /v1/systemone nor POST /v1/chat/completions"),
    ("text", "got text alone"), ("letters", "start it with --decision-config FILE")])
def test_a_server_without_the_endpoint_or_with_text_alone(kind, says):
    with serve(kind) as stub:
        refused(stub, says)


def test_a_server_that_does_not_continue_the_turn_has_not_the_words():
    """It would fill a bank with what is not known. What it can answer it may be asked."""
    with serve("sglang", lacks=(" red", " green")) as stub:
        refused(stub, "no deciding word of depth, normal, irradiance among the 20 likeliest tokens")
        assert judge.open_judge(stub.spec).ask(*draw(1, 1), modalities=("albedo",))[..., 2].isfinite().all()


def test_a_model_that_splits_a_deciding_word_is_refused(monkeypatch):
    monkeypatch.setattr(served_stub, "tokens_of", lambda text: [ord(c) for c in text])
    with serve("vllm") as stub, pytest.raises(ValueError, match="no single token for each of .*; want a model"):
        judge.open_judge(stub.spec).ask(*draw(1, 1))


def test_a_closed_port_is_told_at_once():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(ValueError, match="got no answer to 1 requests .*refused.*want a server; start it"):
        judge.open_judge(f"http://127.0.0.1:{port}#a,size=32").ask(*draw(1, 1))


def test_a_model_that_the_server_has_not_is_answered_by_those_that_it_has():
    with serve("vllm") as stub, pytest.raises(ValueError, match=f"no 'org/other', want one of '{MODEL}' after the #"):
        ServedJudge(stub.spec.replace(MODEL, "org/other")).ask(*draw(1, 1))


@pytest.mark.parametrize("answer", [b"<html>proxy</html>", b"{", b"[]", b'{"model": "org/judge-4b", "choices": []}',
                                    b'{"model": "org/judge-4b", "choices": [{"logprobs": {"content": [7]}}]}', b"null"])
def test_wrong_json_is_one_line(answer):
    for start in (0, 6):                                                        # at the first question, in the middle
        with serve("vllm", before=lambda n, start=start: (200, answer) if n > start else None) as stub:
            refused(stub, "/v1/chat/completions: got ")


def test_a_server_that_restarts_with_another_model_is_found_out():
    with serve("llama.cpp") as stub:
        one = judge.open_judge(stub.spec)
        one.ask(*draw(1, 2))
        stub.model = "org/judge-1b"
        with pytest.raises(ValueError, match="an answer of the model 'org/judge-1b', want 'org/judge-4b'; the"):
            one.ask(*draw(1, 2))


def test_a_model_that_is_gone_is_told_in_the_server_s_words():
    with serve("vllm", before=lambda n: (404, b'{"message": "The model does not exist."}') if n > 4 else None) as stub:
        refused(stub, "got HTTP 404 ({\"message\": \"The model does not exist.\"})")


def test_busy_slow_and_cut_answers_are_asked_again(monkeypatch):
    monkeypatch.setattr(served, "PATIENCE", 0.15)
    rgb, pts = draw(1, 4)
    troubles = {6: (503, b"busy"), 8: (429, b"slow down"), 9: "cut"}

    def trouble(n):
        return time.sleep(0.3) if n == 11 else troubles.get(n)
    with serve("vllm", before=trouble) as stub:
        prob = judge.open_judge(stub.spec).ask(rgb, pts)
        assert len(stub.bodies) == len(NAMES) + 16 + 4
    torch.testing.assert_close(prob, expected(rgb, pts), atol=1e-6, rtol=0)


def test_a_server_that_is_too_slow_is_one_line(monkeypatch):
    monkeypatch.setattr(served, "PATIENCE", 0.05)
    with serve("vllm", before=slow(0.2)) as stub:
        refused(stub, "timed out")


def test_a_bank_keeps_what_was_answered_before_the_server_was_killed(tmp_path):
    photos = (draw(4, size=32)[0] * 255).round().byte()
    with serve("vllm") as stub:
        whole = Bank(tmp_path / "whole", judge.open_judge(stub.spec)).fill(photos, 3)
    killed = len(NAMES) * (1 + 2 * 3) + 5                                       # in the third photo
    with serve("vllm", before=lambda n: "cut" if n > killed else None) as stub:
        with pytest.raises(ValueError, match=r"got no answer to 4 requests .*what the bank holds is not asked again"):
            Bank(tmp_path / "bank", judge.open_judge(stub.spec)).fill(photos, 3)
    with serve("vllm") as stub:                                                 # on another port
        bank = Bank(tmp_path / "bank", judge.open_judge(stub.spec))
        again = bank.fill(photos, 3)
        assert bank.known == 2 * 3 and len(stub.bodies) == len(NAMES) * (1 + 2 * 3)
    assert all(map(torch.equal, again, whole))
    full = Bank(tmp_path / "bank", judge.open_judge("http://127.0.0.1:1#" + stub.spec.partition("#")[2]))
    assert torch.equal(full.fill(photos, 3)[1], whole[1])                       # without a server


# the server of transformers ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A tiny LLaVA that `transformers serve` holds: (address, folder, model)."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        pytest.skip("no fastapi and uvicorn: pip install 'transformers[serving]'")
    import llava
    folder = tmp_path_factory.mktemp("llava")
    model = llava.write_llava(folder)
    (folder / "judge.json").write_text(re.search(r"```json\n(.*?)```", PAGE, re.S)[1])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder),
               "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port),
               "--decision-config", str(folder / "judge.json")]
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not is_up(base):
            assert server.poll() is None, (folder / "log.txt").read_text()[-2000:]
            time.sleep(0.1)
        yield f"{base}#{folder},size={llava.SIDE}", folder, model
    finally:
        server.kill()
        server.wait()


def is_up(base):
    try:
        return urllib.request.urlopen(f"{base}/health", timeout=5).status == 200
    except urllib.error.URLError:
        return False


def test_transformers_serve_answers_as_its_model_does(llava):
    """The words' logits after the official prompt, written here by hand."""
    spec, folder, model = llava
    rgb, pts = draw(1, 2, size=56)
    one = judge.open_judge(spec)
    prob = one.ask(rgb, pts)
    tokenizer = fast(folder)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in CLIP)
    for p, picture in enumerate(draw_markers(rgb, pts)[0]):
        for k, m in enumerate(MODALITIES.values()):
            text = (f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 16}<|vision_end|>{m.question}<|im_end|>\n"
                    f"<|im_start|>assistant\n{m.prefix}")
            blank = " " if m.prefix else ""
            words = [tokenizer(blank + w, add_special_tokens=False).input_ids for w in m.words]
            ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=((picture - mean) / std)[None]).logits[0, -1]
            want = (logits[words[0]] - logits[words[1]]).sigmoid()
            assert len(words[0]) == len(words[1]) == 1 and math.isclose(prob[0, p, k], want, abs_tol=2e-6)
    some = one.ask(rgb, pts, modalities=("normal",))
    assert some[..., [0, 2, 3]].isnan().all() and torch.equal(some[..., 1], prob[..., 1])
    with pytest.raises(ValueError, match="got no 'other', want one of"):
        ServedJudge(f"{spec.partition('#')[0]}#other,size=56").ask(rgb, pts)


def test_the_prompt_of_the_page_is_the_one_file_that_transformers_reads():
    file = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.S)[1])
    assert file["labels"] == dict(choice=[" red", " green"], noul=["Yes", "No"]) and "<|mark|>" in file["chat_template"]
