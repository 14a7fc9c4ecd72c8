"""The instructions that come with the package, the rule that keeps tasks apart, and asking for more."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from imprompt.bases import load_base
from imprompt.core.errors import ImpromptError
from imprompt.data.instructions import (
    OBJECT,
    TASKS,
    ask_for_more,
    fault_of,
    filled,
    instructions,
)
from imprompt.diorama import OBJECT_KINDS


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_many_instructions_that_keep_the_rule(task):
    lines = instructions(task)
    assert len(lines) >= 60 and len(set(lines)) == len(lines)
    for line in lines:
        assert fault_of(line, task) is None
        others = [other for other in TASKS if other != task]
        assert all(fault_of(line, other) for other in others), line


def test_no_kind_of_object_has_a_keyword_of_another_task():
    for line in instructions("object"):
        for kind in OBJECT_KINDS:
            text = filled(line, kind)
            assert kind in text and OBJECT not in text
            assert all(fault_of(text, task) for task in TASKS if task != "object"), text


def test_none_is_cut_off_by_the_embedded_text_encoder():
    base = load_base("diorama")
    longest = max(OBJECT_KINDS, key=len)
    texts = [filled(line, longest) for task in TASKS for line in instructions(task)]
    ends = (base.tokenize(texts) == base.tokenizer.eos_token_id).int().argmax(1)
    lengths = [len(base.tokenizer.tokenize(text)) + 1 for text in texts]
    assert ends.tolist() == lengths


@pytest.mark.parametrize(
    "line, task, part",
    [
        ("use the style and the layout", "style", "composition"),
        ("paint it like this", "style", "none of the task's keywords"),
        ("take the object", "object", "write {object}"),
        ("all of the style", "style", "everything"),
        ("use the {object}", "style", "object"),
    ],
)
def test_what_breaks_the_rule_is_said(line, task, part):
    fault = fault_of(line, task)
    assert fault is not None and part in fault


def test_words_that_only_begin_like_a_keyword_are_no_fault():
    assert fault_of("use the style of this alley", "style") is None


def test_users_add_their_own(tmp_path):
    (tmp_path / "style.txt").write_text("# mine\n\nuse this style, please\nuse the style\n")
    lines = instructions("style", tmp_path)
    assert lines[-1] == "use this style, please"
    assert len(lines) == len(instructions("style")) + 1
    (tmp_path / "face.txt").write_text("copy the person's style\n")
    with pytest.raises(ImpromptError, match="keyword of the task style"):
        instructions("face", tmp_path)
    with pytest.raises(ImpromptError, match="no folder"):
        instructions("face", tmp_path / "nowhere")
    with pytest.raises(ImpromptError, match="choose one of: everything, style"):
        instructions("mood")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImpromptError, match="holds no instructions; they stand in everything.txt"):
        instructions("face", tmp_path / "empty")
    (tmp_path / "face.txt").write_bytes(b"use the f\xe4ce\n")
    with pytest.raises(ImpromptError, match=r"face\.txt cannot be read"):
        instructions("face", tmp_path)


@pytest.fixture
def endpoint():
    """A language model that says the same each time, and keeps what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        answer = "1. Use the style\n- Paint with this style\nuse the face\n\nPaint with this style"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers.get("Authorization"), json.loads(body)))
            content = {"choices": [{"message": {"content": self.answer}}]}
            if self.answer == "broken":
                content = {"error": "none"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, Handler
    server.shutdown()


def test_a_language_model_is_asked_for_more_and_its_faults_are_left_out(endpoint):
    address, asked, _ = endpoint
    assert ask_for_more("style", 4, endpoint=address, model="m", key="k") == [
        "paint with this style"
    ]
    path, key, body = asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer k" and body["model"] == "m"
    assert "layout" in body["messages"][0]["content"]


def test_what_the_user_has_already_is_not_asked_for(endpoint, tmp_path):
    address, _, _ = endpoint
    (tmp_path / "style.txt").write_text("paint with this style\n")
    assert ask_for_more("style", 4, endpoint=address, model="m", folder=tmp_path) == []


def test_an_endpoint_that_does_not_answer_is_a_clear_error(endpoint):
    address, _, handler = endpoint
    handler.answer = "broken"
    with pytest.raises(ImpromptError, match="answered without"):
        ask_for_more("style", 4, endpoint=address, model="m")
    with pytest.raises(ImpromptError, match="cannot be asked"):
        ask_for_more("style", 4, endpoint="http://127.0.0.1:1", model="m")
    with pytest.raises(ImpromptError, match="no address"):
        ask_for_more("style", 4, endpoint="file:///etc", model="m")
