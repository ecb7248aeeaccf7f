from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from anabranch.api.metrics import SlidingRate

from .conftest import Api, EchoModel, make


def scrape(api: Api) -> dict[str, float]:
    response = api.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        sample.name + "".join(f",{k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_they_move() -> None:
    api = make(EchoModel(delay=0.002))
    before = scrape(api)
    assert before["anabranch_aborted_total,model=echo"] == 0
    api.chat("one two three", n=2)
    api.chat("one two three", stream=True)
    api.complete("")
    api.get("/v1/models/echo")
    api.get("/wp-login.php")
    after = scrape(api)
    model = ",model=echo"
    assert after["anabranch_prompt_tokens_total" + model] == 6
    assert after["anabranch_cached_prompt_tokens_total" + model] == 3
    assert after["anabranch_generated_tokens_total" + model] == 9
    assert after["anabranch_preemptions_total" + model] == 0
    assert after["anabranch_waiting_requests" + model] == 0
    assert after["anabranch_running_requests" + model] == 0
    assert after["anabranch_cache_usage_ratio" + model] == 0.25
    assert after["anabranch_tokens_per_second" + model] > 0
    assert after["anabranch_time_to_first_token_seconds_count" + model] == 2
    assert after["anabranch_inter_token_seconds_count" + model] == 6
    assert after["anabranch_inter_token_seconds_sum" + model] >= 6 * 0.002
    assert after["anabranch_request_seconds_count" + model] == 2
    assert after["anabranch_request_prompt_tokens_sum" + model] == 6
    assert after["anabranch_request_output_tokens_sum" + model] == 9
    requests = "anabranch_requests_total,endpoint={},status={}"
    assert after[requests.format("/v1/chat/completions", 200)] == 2
    assert after[requests.format("/v1/completions", 400)] == 1
    assert after[requests.format("/v1/models/{model}", 200)] == 1
    assert after[requests.format("other", 404)] == 1


def test_two_apps_do_not_mix() -> None:
    first, second = make(), make()
    first.chat()
    key = "anabranch_time_to_first_token_seconds_count,model=echo"
    assert scrape(first)[key] == 1
    assert scrape(second).get(key, 0) == 0


def test_sliding_rate() -> None:
    rate = SlidingRate(10)
    assert rate.per_second() == 0
    for second in range(31):
        rate.observe(float(second), 5 * second if second < 20 else 100)
    assert rate.per_second() == 0
    for second in range(31, 36):
        rate.observe(float(second), 100 + 8 * (second - 30))
    assert rate.per_second() == 4.0
    rate.observe(35.0, 140)
    assert rate.per_second() == 4.0
