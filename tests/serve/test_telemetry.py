"""The engine's numbers in the metrics, step by step, on the executor without weights."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from deepseek.serve.api.metrics import Metrics
from deepseek.serve.audit import AuditResult
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.request import Request
from deepseek.serve.core.scheduler import Scheduler, SchedulerConfig
from deepseek.serve.generation import GenerationRequest
from deepseek.serve.sim import SimExecutor, VirtualClock
from deepseek.serve.telemetry import Telemetry


def values(metrics: Metrics) -> dict[str, float]:
    """Return every sample without buckets, by name."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if "le" not in sample.labels and not sample.name.endswith("_created")
    }


def serve(prompts: list[tuple[int, ...]], powercap: Path, new_tokens: int = 4) -> dict[str, float]:
    """Run requests to their end, a second a step, and return the metrics."""
    clock, metrics = VirtualClock(), Metrics("tiny")
    executor = SimExecutor(
        num_pages=32,
        page_size=4,
        max_step_tokens=16,
        context=64,
        vocab_size=50,
        spend=clock.advance,
        base_s=1.0,
        token_s=0.0,
    )
    config = SchedulerConfig(context=64, max_step_tokens=16)
    scheduler = Scheduler(config, PagePool(32, 4))
    telemetry = Telemetry(
        metrics,
        scheduler,
        price_per_hour=3600.0,
        clock=lambda: clock.now_s,
        powercap=powercap,
    )
    for number, prompt in enumerate(prompts):
        request = Request(id=str(number), prompt=prompt, max_tokens=new_tokens)
        executor.open(request.id, GenerationRequest(prompt=prompt, max_tokens=new_tokens))
        scheduler.add(request, 0.0)
    while not scheduler.is_idle:
        step = scheduler.plan(clock.now_s)
        results = executor.execute(step.work, step.copies)
        chosen = [[choice.token_id for choice in result.tokens] for result in results]
        scheduler.commit(step, chosen, [None] * len(chosen), clock.now_s)
        telemetry.on_step(step, 1.0)
    telemetry.on_audit(AuditResult(kl=0.5, worst_kl=0.9, agreement=0.75, num_tokens=8))
    return values(metrics)


def test_one_request_has_all_of_the_machine_and_two_share_it(tmp_path: Path) -> None:
    alone = serve([(1, 2, 3)], tmp_path)
    assert alone["deepseek:request_compute_seconds_sum"] == 4
    assert alone["deepseek:request_cost_sum"] == 4
    assert alone["vllm:request_prefill_time_seconds_sum"] == 1
    assert alone["vllm:request_inference_time_seconds_sum"] == 4
    assert alone["vllm:iteration_tokens_total_sum"] == 3 + 3
    both = serve([(1, 2, 3), (4, 5, 6)], tmp_path)
    assert both["deepseek:request_compute_seconds_count"] == 2
    assert both["deepseek:request_compute_seconds_sum"] == 4


def test_cache_and_audits_are_counted(tmp_path: Path) -> None:
    prompt = tuple(range(12))
    found = serve([prompt, prompt], tmp_path)
    assert found["vllm:prefix_cache_queries_total"] == 24
    assert found["vllm:prefix_cache_hits_total"] == 8
    assert found["deepseek:audit_tokens_total"] == 8
    assert found["deepseek:audit_tokens_agreeing_total"] == 6
    assert found["deepseek:audit_kl_sum"] == 0.5
    assert 0 <= found["deepseek:kv_waste"] < 1
    assert found["vllm:kv_cache_usage_perc"] == 0
    assert "deepseek:energy_joules_total" not in found  # the machine does not tell


def test_energy_is_read_where_the_machine_tells_it(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("1000000000")
    (zone / "energy_uj").write_text("5")
    assert serve([(1, 2)], tmp_path)["deepseek:energy_joules_total"] == 0  # it used none
