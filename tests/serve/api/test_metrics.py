"""Numbers, log lines and events."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deepseek.errors import ConfigError
from deepseek.records import Event
from deepseek.serve.api import Metrics
from deepseek.serve.generation import EngineError, QueueFull
from tests.serve.api.support import HEADERS, call, chat, error_of, make_app, post
from tests.serve.fakes import FakeGenerator


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return every sample: its name and the values of its labels -> its value."""
    return {
        (sample.name, tuple(v for k, v in sorted(sample.labels.items()) if k != "model_name")): (
            sample.value
        )
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_an_answer_is_counted() -> None:
    metrics, generator = Metrics("tiny"), FakeGenerator()
    generator.num_cached = 3
    app = make_app(generator, metrics=metrics)
    chat(app, n=2, logprobs=True)
    found = samples(metrics)
    prompt = len(generator.requests[0].prompt)
    assert found["vllm:prompt_tokens_total", ()] == prompt
    assert found["vllm:prompt_tokens_cached_total", ()] == 3
    assert found["vllm:generation_tokens_total", ()] == 26
    assert found["vllm:request_success_total", ("stop",)] == 2
    assert found["vllm:time_to_first_token_seconds_count", ()] == 2
    assert found["vllm:inter_token_latency_seconds_count", ()] == 24
    assert found["vllm:e2e_request_latency_seconds_count", ()] == 2
    assert found["vllm:request_params_n_sum", ()] == 2
    assert found["vllm:num_requests_running", ()] == 0
    assert found["deepseek:token_logprob_sum", ()] == 1.0
    assert found["deepseek:http_responses_total", ("2xx",)] == 1


def test_what_went_wrong_is_counted() -> None:
    metrics, generator = Metrics("tiny"), FakeGenerator("{ no json")
    app = make_app(generator, metrics=metrics)
    chat(app, response_format={"type": "json_object"})
    chat(app, max_tokens=2)
    generator.finish = "repetition"
    chat(app)
    generator.finish, generator.error = None, QueueFull("full", 1)
    chat(app)
    generator.error = EngineError("dead")
    chat(app)
    generator.ready = False
    chat(app)
    found = samples(metrics)
    assert found["deepseek:invalid_json_total", ()] == 1
    assert found["deepseek:truncated_total", ()] == 1
    assert found["deepseek:repetition_total", ()] == 1
    assert found["vllm:admission_rejections_total", ("overloaded",)] == 1
    assert found["vllm:admission_rejections_total", ("not_ready",)] == 1
    assert found["vllm:request_success_total", ("error",)] == 1
    assert found["deepseek:http_responses_total", ("5xx",)] == 3


def test_attack_28_nothing_from_a_client_becomes_a_label() -> None:
    metrics = Metrics("tiny")
    app = make_app(metrics=metrics, adapters=lambda: {"poet"})
    chat(app)
    chat(app, model="poet")
    error_of(chat(app, n=0), 400)
    error_of(call(app, "GET", "/v1/nothing"), 404)
    before = set(samples(metrics))
    for number in range(20):
        chat(app, model=f"strange-{number}\n", user=f"user-{number}")
        call(app, "GET", f"/v1/strange-{number}")
        call(app, f"X{number}", "/v1/models")
        call(app, "GET", "/v1/models", headers={"Authorization": f"Bearer {number}"})
    assert set(samples(metrics)) == before
    assert b"strange" not in metrics.text() and b"user-" not in metrics.text()


def test_attack_28_log_lines_are_json(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="deepseek.serve.api")
    app = make_app(FakeGenerator("x"))
    evil = '/v1/\n{"level": "error"}\r\nfake line\x1b[31m'
    call(app, "GET", "/x%0aINFO%20fake", headers=HEADERS | {"x-request-id": "a"})
    from tests.serve.api.support import Caller, run

    run(Caller(app, {}, evil)())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    for line in lines:
        assert "\n" not in line and "\r" not in line and "\x1b" not in line
        entry = json.loads(line)
        assert entry["request_id"].startswith("req-") and entry["tenant"] == "ann"
        assert entry["status"] == 404


def test_an_unexpected_error_is_logged_with_its_request(caplog: pytest.LogCaptureFixture) -> None:
    generator = FakeGenerator()
    generator.error = RuntimeError("inside")
    response = chat(make_app(generator))
    assert error_of(response, 500)["type"] == "server_error"
    failures = [record for record in caplog.records if record.exc_info]
    assert len(failures) == 1
    entry = json.loads(failures[0].getMessage())
    assert entry["request_id"] == response.headers["x-request-id"]
    assert entry["error"] == "RuntimeError"


def test_metrics_are_a_route() -> None:
    app = make_app()
    response = call(app, "GET", "/metrics")
    assert response.status_code == 200 and "vllm:num_requests_running" in response.text
    assert response.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("vllm:nothing", ""),
        ("vllm:request_success", "strange"),
        ("vllm:request_success", ""),
        ("vllm:prompt_tokens", "stop"),
    ],
)
def test_unknown_series_and_labels_are_refused(name: str, label: str) -> None:
    with pytest.raises(ConfigError):
        Metrics("tiny").observe(name, 1, label)


def test_the_engine_feeds_its_own_numbers() -> None:
    metrics = Metrics("tiny")
    metrics.observe("vllm:kv_cache_usage_perc", 0.25)
    metrics.observe("vllm:kv_cache_usage_perc", 0.5)
    metrics.observe("deepseek:token_entropy", 1.2)
    metrics.observe("vllm:num_preemptions", 2)
    found = samples(metrics)
    assert found["vllm:kv_cache_usage_perc", ()] == 0.5
    assert found["deepseek:token_entropy_sum", ()] == 1.2
    assert found["vllm:num_preemptions_total", ()] == 2


@pytest.mark.parametrize("has_text", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_an_event_for_every_answer(has_text: bool, stream: bool) -> None:
    seen: list[Event] = []
    generator = FakeGenerator()
    generator.num_cached = 2
    app = make_app(generator, on_event=seen.append, events_have_text=has_text)
    response = chat(app, n=2, logprobs=True, stream=stream)
    assert [event.choice for event in sorted(seen, key=lambda event: event.choice)] == [0, 1]
    for event in seen:
        assert event.request_id == response.headers["x-request-id"]
        assert (event.tenant, event.model, event.route) == ("ann", "tiny", "chat")
        assert (event.num_tokens, event.num_cached_tokens) == (13, 2)
        assert event.num_prompt_tokens == len(generator.requests[0].prompt)
        assert (event.finish_reason, event.mean_logprob) == ("stop", -0.5)
        assert event.first_token_s is not None and 0 <= event.first_token_s <= event.total_s
        assert event.text == ("Hello there." if has_text else None)
        assert (event.prompt is not None) == has_text
        assert Event.from_dict(json.loads(json.dumps(event.to_dict()))) == event


def test_who_listens_cannot_break_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Any) -> None:
        raise ValueError("full disk")

    assert chat(make_app(on_event=fail)).status_code == 200
    assert any("event sink" in record.getMessage() for record in caplog.records)


def test_what_is_refused_is_no_answer() -> None:
    seen: list[Event] = []
    generator = FakeGenerator()
    generator.error = QueueFull("full", 1)
    app = make_app(generator, on_event=seen.append)
    error_of(chat(app), 503)
    error_of(post(app, "/v1/completions", {"prompt": ""}), 400)
    error_of(chat(app, structured_outputs={"regex": "("}), 400)
    assert seen == []
