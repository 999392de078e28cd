"""`redknot eval`: what it asks, how it scores, what its rows mean, and what it refuses."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from redknot.cli.main import main
from redknot.eval import arrivals, scoring
from redknot.eval.statistics import cluster_bootstrap, paired_interval, paired_wald_interval
from redknot.eval.tasks import TASKS, make_task_batch, make_task_prompt
from redknot.eval.text_tasks import read_text_task, split_documents

pytestmark = pytest.mark.transformers
SMALL = ["--policies", "naive,redknot", "--lengths", "200", "-n", "4"]
MEASURED = ("ttft_seconds", "ttft_ratio", "seconds_per_token")


# --- tasks ----------------------------------------------------------------------------------------

STATES = re.compile(r"^(\w+) (?:arrives|lands|docks|returns) (\d\d):00 \.$")
POINTS = re.compile(r"^(\w+) (?:follows|trails|shadows) (\w+) \+(\d)h \.$")
PLACE = re.compile(r"^(?:Note|Report|Letter|Memo) from (\w+) :$")


def read(documents):
    """What a careful reader knows: hours (the last word on a person wins), chains, places."""
    hours, sources, hops, places = {}, {}, {}, {}
    for index, document in enumerate(documents):
        for line in document.splitlines():
            if match := STATES.match(line):
                sources[match[1]] = (*sources.get(match[1], ()), index)
                hours[match[1]], hops[match[1]] = int(match[2]), 0
            elif match := POINTS.match(line):
                name, target = match[1], match[2]
                hours[name] = (hours[target] + int(match[3])) % 24
                sources[name], hops[name] = (*sources[target], index), hops[target] + 1
            elif match := PLACE.match(line):
                places.setdefault(match[1], []).append(index)
    return hours, sources, hops, places


@pytest.mark.parametrize("length", [300, 1000, 4096, 8192])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_answers_follow_from_the_text(seed, length):
    prompt = make_task_prompt(seed, length)
    hours, sources, hops, places = read(prompt.documents)
    begins = np.cumsum([1, *(len(text.split()) for text in prompt.documents)])
    assert length - 20 < begins[-1] <= length
    for question in prompt.questions:
        words = question.text.split()
        if question.task == "count":
            assert question.answers == (f"{len(places[words[3]]):02d}:00",)
            continue
        name = words[-3]
        assert question.answers == (f"{hours[name]:02d}:00",)
        assert question.evidence == sources[name]
        kind = {"direct": (1, 0), "relative": (2, 1), "distant": (2, 1), "chain": (3, 2),
                "conflict": (2, 0)}  # fmt: skip
        assert (len(sources[name]), hops[name]) == kind[question.task]
        apart = begins[question.evidence[-1]] - begins[question.evidence[0]]
        if question.task in ("relative", "distant"):
            assert (question.task == "distant") == (apart >= length // 2)


def test_every_task_occurs_and_equal_seeds_give_equal_prompts():
    prompts = [make_task_prompt(seed, 1000) for seed in range(6)]
    assert {q.task for prompt in prompts for q in prompt.questions} == set(TASKS)
    assert prompts[3] == make_task_prompt(3, 1000)
    assert len({prompt.documents for prompt in prompts}) == 6
    assert make_task_prompt(3, 1000).documents != arrivals.make_prompt(3, 1000, 1).documents
    for prompt in prompts:  # so that one prefill serves them all
        assert len({question.text.split()[0] for question in prompt.questions}) == 1


def test_a_training_batch_holds_answered_questions_of_every_task():
    batch = make_task_batch(np.random.default_rng((7, 1)), 4, 600, 30)
    words = np.array(arrivals.VOCABULARY)[batch.token_ids]
    for row, roles, known in zip(words, batch.roles, batch.known_hours, strict=True):
        lines = " ".join(row).replace(" . ", " .\n").replace(" : ", " :\n").splitlines()
        hours, _, hops, _ = read(["\n".join(lines).removeprefix("[BOS] ")])
        answers = np.isin(roles, (arrivals.ROLE_DIRECT, arrivals.ROLE_RELATIVE)).nonzero()[0]
        people = [i for i in answers if row[i - 3] in hours]
        assert len(answers) > 10 and len(people) > 5
        assert all(row[i] == f"{hours[row[i - 3]]:02d}:00" for i in people)
        pointing = (known >= 0).nonzero()[0]
        assert {hops[row[i - 3]] for i in pointing} <= {1, 2}
        assert all(arrivals.VOCABULARY[known[i]] == f"{hours[row[i - 3]]:02d}:00" for i in pointing)


# --- text files -----------------------------------------------------------------------------------


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_documents_joined_are_the_context():
    numbered = "Read this.\n\nPassage 1:\nA\n\nb.\n\nPassage 2:\nC.\n"
    assert split_documents(numbered) == (
        "Read this.\n\n",
        "Passage 1:\nA\n\nb.\n\n",
        "Passage 2:\nC.\n",
    )
    assert split_documents("one\ntwo\n\n\nthree\n\n") == ("one\ntwo\n\n\n", "three\n\n")
    assert split_documents("\n\na\n\nb") == ("\n\na\n\n", "b")
    assert split_documents("x#y#z", "#") == ("x", "#y", "#z")
    assert split_documents("only one") == ("only one",)


def test_longbench_and_ruler_lines(tmp_path):
    row = {"context": "a\n\nb", "answers": ["x", "y"], "length": 3, "dataset": "d"}
    path = write_lines(tmp_path / "qa.jsonl", {**row, "input": "Q1"}, {**row, "input": "Q2"})
    task = read_text_task(path, question_template="? {input} =")
    assert (task.name, task.metric, len(task.prompts)) == ("qa", "f1", 1)
    assert task.prompts[0].documents == ("a\n\n", "b")
    assert [q.text for q in task.prompts[0].questions] == ["? Q1 =", "? Q2 ="]
    assert len(read_text_task(path, limit=1).prompts[0].questions) == 1
    ruler = {"index": 0, "input": "Some text.\n\nMore.\nWhat is it?", "outputs": ["5", "6"]}
    task = read_text_task(write_lines(tmp_path / "niah.jsonl", ruler))
    assert task.metric == "recall"
    assert task.prompts[0].documents == ("Some text.\n\n", "More.\n")
    assert task.prompts[0].questions[0].text == "What is it?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: must be an object"),
        ('{"input": "q", "context": "c"}', "line 1: needs 'answers'"),
        ('{"input": "q", "context": "c", "answers": [3]}', "line 1: answers must be texts"),
        ('{"input": " ", "context": "c", "answers": ["a"]}', "line 1: input is empty"),
        ('{"input": "q", "answers": ["a"]}', "has no 'context'"),
        ("", "no questions"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, capsys, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text(line + "\n")
    assert main(["eval", "--tasks", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "t.jsonl" in error and error.count("\n") == 1


# --- scores and intervals -------------------------------------------------------------------------


def test_scores_of_texts():
    assert scoring.normalise(" The  Cat's,\n a hat! ") == "cats hat"
    assert scoring.exact_match("21:00 .", ["21:00"]) == 1
    assert scoring.exact_match("21:00 03:00", ["21:00"]) == 0
    assert scoring.f1("the red big house", ["a big red barn", "no"]) == pytest.approx(2 / 3)
    assert scoring.f1("", ["x"]) == 0
    assert scoring.recall("Found 12 and ABC.", ["abc", "13"]) == 0.5


def test_the_paired_interval_by_hand():
    # 5 pairs right in the first alone, 2 in the second alone, of 100: 6/102 and 3/102.
    half = 1.96 * math.sqrt((9 / 102 - (3 / 102) ** 2) / 102)
    low, high = paired_wald_interval(5, 2, 100)
    assert (low, high) == pytest.approx((3 / 102 - half, 3 / 102 + half))
    low, high = paired_wald_interval(0, 0, 1000)  # none differ: not proof that none could
    assert high == pytest.approx(1.96 * math.sqrt(2 / 1002 / 1002))
    assert low == -high


def test_prompts_are_resampled_whole():
    same_in_prompt = [0.0] * 50 + [1.0] * 50
    ten_prompts = np.repeat(np.arange(10), 10)
    low, high = cluster_bootstrap(same_in_prompt, ten_prompts)
    # The mean of 10 coins: binomial quantiles, not those of 100 coins (.40, .60).
    assert (low, high) == (0.2, 0.8)
    assert cluster_bootstrap([0.5] * 7, range(7)) == (0.5, 0.5)
    assert cluster_bootstrap(same_in_prompt, ten_prompts, seed=1) == cluster_bootstrap(
        same_in_prompt, ten_prompts, seed=1
    )


def test_the_interval_of_equal_scores_is_not_empty():
    low, high = paired_interval([1.0] * 100, [1.0] * 100, range(100))
    assert low < 0 < high < 0.03
    assert paired_interval([0.5] * 9, [0.25] * 9, range(9)) == (0.25, 0.25)  # F1: bootstrap alone


# --- the command ----------------------------------------------------------------------------------


def run(tmp_path, *arguments, name="out.json"):
    path = tmp_path / name
    assert main(["eval", *arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run(tmp_path_factory.mktemp("eval"), *SMALL, "--controls")


def test_rows_say_what_they_are(report):
    keys = {"policy", "task", "length", "n", "score", "ci", "delta", "delta_ci", "token_agreement",
            "kl", "flops_saved", "kv_bytes", "ttft_ratio", "rows_recomputed",
            "heads_refreshed"}  # fmt: skip
    assert report["complete"] and {"command", "date", "hardware", "versions"} <= set(report)
    assert all(keys <= set(row) for row in report["rows"])
    for row in report["rows"]:
        assert row["length"] == 200 and 1 <= row["n"] <= 4
        assert row["ci"][0] <= row["score"] <= row["ci"][1]
        assert row["delta_ci"][0] <= row["delta"] <= row["delta_ci"][1]
        assert row["not_gated_because"] and not row["gated"]
    policies = [row["policy"] for row in report["rows"] if row["task"] == "direct"]
    assert policies[:3] == ["dense", "naive", "redknot"]
    assert [p for p in policies if "wrong heads" in p or "random" in p or "no global" in p]


def test_dense_is_the_reference(report):
    dense = [row for row in report["rows"] if row["policy"] == "dense"]
    assert {row["task"] for row in dense} >= {"direct", "relative", "distant"}
    for row in dense:
        assert row["delta"] == row["kl"] == row["flops_saved"] == 0
        assert row["token_agreement"] == row["ttft_ratio"] == row["rows_recomputed"] == 1


def test_kl_is_compared_with_the_published_policys(report):
    """Over the same questions; a policy is no farther from dense than itself."""
    for task in ("direct", "relative", "distant"):
        rows = {row["policy"]: row for row in report["rows"] if row["task"] == task}
        assert rows["redknot"]["kl_minus_redknot_ci"] == [0, 0]
        for row in rows.values():
            low, high = row["kl_minus_redknot_ci"]
            assert low - 1e-9 <= row["kl_minus_redknot"] <= high + 1e-9
            assert row["kl_minus_redknot"] == pytest.approx(row["kl"] - rows["redknot"]["kl"])
        assert rows["naive"]["kl_minus_redknot"] != 0


def test_reuse_saves_and_refreshes_what_the_policy_says(report):
    row = {row["policy"]: row for row in report["rows"] if row["task"] == "direct"}
    assert row["naive"]["rows_recomputed"] == row["naive"]["heads_refreshed"] == 0
    assert row["naive"]["flops_saved"] > row["redknot"]["flops_saved"] > 0.2
    assert 0 < row["redknot"]["heads_refreshed"] <= 0.15
    assert row["redknot"]["kv_bytes"] < row["dense"]["kv_bytes"]
    counts = report["shared_equals_alone"]["redknot"]
    assert counts[0] == counts[1] > 0


def test_equal_seeds_give_equal_rows_and_others_do_not(tmp_path, report):
    def plain(rows):
        return [{k: v for k, v in r.items() if k not in MEASURED} for r in rows if not r["control"]]

    assert plain(run(tmp_path, *SMALL)["rows"]) == plain(report["rows"])
    other = run(tmp_path, *SMALL, "--seed", "5", name="other.json")
    assert plain(other["rows"]) != plain(report["rows"])


def test_an_interrupted_run_is_continued(tmp_path, monkeypatch, capsys):
    from redknot.eval import evaluation

    def evaluate(n):
        return main(["eval", "--policies", "naive,redknot", "--lengths", "200", "--tasks", "direct",
                     "-n", str(n), "--json", str(tmp_path / "out.json")])  # fmt: skip

    whole, asked = evaluation.answer_prompt, []

    def break_off(*given):
        asked.append(given[1])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(evaluation, "answer_prompt", break_off)
    assert evaluate(12) == 130
    assert "interrupted" in capsys.readouterr().out
    assert not json.loads((tmp_path / "out.json").read_text())["complete"]
    partial = tmp_path / "out.json.partial"
    assert len(partial.read_text().splitlines()) == 2  # the settings and one prompt
    partial.write_text(partial.read_text() + '{"group": "broken o')
    assert evaluate(13) == 2
    assert "other settings" in capsys.readouterr().err
    assert evaluate(12) == 0
    assert asked.count(asked[0]) == 1 and asked[1] == asked[2]
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["n"] == 12
    assert not partial.exists()


def test_a_file_of_questions_and_a_plot(tmp_path, capsys):
    prompt = make_task_prompt(2, 300)
    rows = [
        {"context": "\n".join(prompt.documents), "input": q.text, "answers": list(q.answers)}
        for q in prompt.questions
        if q.task == "direct"
    ]
    path = write_lines(tmp_path / "mine.jsonl", *rows)
    report = run(
        tmp_path, "--tasks", str(path), "--policies", "redknot", "--question-template", "{input}",
        "--max-new-tokens", "3", "--plot", str(tmp_path / "plot.png"),
    )  # fmt: skip
    assert [row["policy"] for row in report["rows"]] == ["dense", "redknot"]
    assert all(row["task"] == "mine" and row["n"] == len(rows) for row in report["rows"])
    assert min(row["score"] for row in report["rows"]) > 0.7
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "mine, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "-n must be at least 1"),
        (["--seed", "-1"], "--seed must be >= 0"),
        (["--lengths", "1000,many"], "--lengths must be numbers"),
        (["--lengths", "64"], "--lengths must be at least 128"),
        (["--lengths", "9000"], "more than the model's context"),
        (["--tasks", "riddles"], "unknown task 'riddles'"),
        (["--tasks", "nowhere.jsonl"], "cannot read"),
        (["--policies", "magic"], "unknown policy 'magic'"),
        (["--policies", "redknot:speed=3"], "has no option 'speed=3'"),
        (["--policies", "redknot:ffn_mass=7"], "ffn_mass must be in"),
        (["--policies", "redknot:ffn_mass=much"], "ffn_mass must be in (0, 1], got 'much'"),
        (["--policies", "naive,naive"], "given twice"),
        (["--json", "/no/such/folder/x.json"], "cannot write it: No such file"),
        (["--heads", "missing.json"], "missing.json"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main(["eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
