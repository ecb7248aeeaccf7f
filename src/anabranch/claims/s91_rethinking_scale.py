"""S91, Rethinking Scale: a small model with a few hundred labels classifies far above its prompt.

Polarity of rated texts from four domains. The model sees each training row once, in an order whose
beginnings are stratified subsets and at a constant learning rate: after n rows it is the model that
n rows would have given, so that one run measures the whole learning curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from anabranch import adapters, models
from anabranch.claims.base import Claim, Measurement
from anabranch.errors import MissingExtra
from anabranch.evaluation.classification import compare, human_ceiling, interval, single_label
from anabranch.evaluation.labelling import full_assignment, rejection
from anabranch.evaluation.learning_curve import fit_curve, nested_subsets
from anabranch.evaluation.plotting import Plot
from anabranch.evaluation.polarity import LABELS, RatedText, made_texts, rated_texts, stratified
from anabranch.models.progress import Progress
from anabranch.training.annotation.scoring import Asker
from anabranch.training.errors import DataError
from anabranch.training.hooks import Hook
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.options import TrainOptions
from anabranch.training.tasks.classification import ClassificationTask
from anabranch.training.template import Template
from anabranch.training.trainer import Trainer

TRAIN = 800
TEST = 250
SIZES = (104, 400, 800)
"""Whole steps of 8 rows."""
LONGEST = 90
"""Characters; longer texts would take the claim beyond its three minutes."""
PROMPT = "{text}\nSentiment (negative, neutral or positive):"
OPTIONS: dict[str, Any] = {
    "batch": 8,
    "lr": 5e-4,
    "schedule": "constant",
    "warmup": 0.0,
    "shuffle": False,
}
ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LABELLERS = (0.2, 0.3, 0.4)
TOLERANCE = 0.02


class RethinkingScale(Claim):
    """Fine-tuned small model against its own zero-shot answers."""

    id = "S91"
    name = "rethinking-scale"
    system = "Rethinking Scale (small models for text classification, hybrid labelling)"
    paper = "Llama-2-7B goes from about 37 % zero-shot to 75 % fine-tuned, as GPT-4"
    baseline = "the same model and prompt zero-shot; every label looked at by the coder"
    method = "LoRA r=16 on 800 rows, seen once, labels scored; coders reject proposed labels"
    threshold = (
        "macro-F1 >= zero-shot + 0.20; accuracy within 0.02 of monotone in 104, 400, 800 rows; "
        "rejection <= 60 % of the clicks of full assignment at >= 0.95 of its quality"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """One run of 100 steps, tested at three sizes, and the labelling simulation."""
        texts, note = _texts(progress, seed)
        drawn = stratified(texts, TRAIN + TEST, seed)
        test, pool = drawn[:TEST], drawn[TEST:]
        order = nested_subsets([t.domain + t.label for t in pool], [TRAIN], seed)[TRAIN]
        train = [pool[i] for i in order]
        truth = [text.label for text in test]

        bench = Bench()
        progress("zero-shot", 0.05)
        zero = bench.labels(test)
        found: dict[int, list[str]] = {}
        bench.train(train, seed, lambda rows: found.update({rows: bench.labels(test)}), progress)

        accuracy = {rows: single_label(truth, found[rows], LABELS).accuracy for rows in SIZES}
        tuned, before = (single_label(truth, said, LABELS) for said in (found[TRAIN], zero))
        lexical = _tfidf(train, test)
        curve = fit_curve(list(accuracy.items()))
        progress("simulating coders", 0.95)
        workflow = _workflow(texts[:TRAIN], seed)
        monotone = all(accuracy[b] >= accuracy[a] - TOLERANCE for a, b in itertools.pairwise(SIZES))
        against = compare(truth, zero, found[TRAIN])
        ceiling = human_ceiling([t.ratings for t in test], truth)
        figures: dict[str, Any] = {
            "macro_f1": {
                "zero_shot": round(before.macro_f1, 3),
                "fine_tuned": round(tuned.macro_f1, 3),
                "tfidf_logistic_regression": round(
                    single_label(truth, lexical, LABELS).macro_f1, 3
                ),
            },
            "fine_tuned_accuracy_95_percent": _interval(truth, found[TRAIN], seed),
            "accuracy": {
                "zero_shot": round(before.accuracy, 3),
                **{f"{rows} rows": round(value, 3) for rows, value in accuracy.items()},
                "tfidf_logistic_regression": round(
                    single_label(truth, lexical, LABELS).accuracy, 3
                ),
                "one human rater": round(ceiling, 3),
            },
            "mcnemar_p_fine_tuned_against_zero_shot": float(f"{against.p_value:.2g}"),
            "mcnemar_p_fine_tuned_against_tfidf": float(
                f"{compare(truth, lexical, found[TRAIN]).p_value:.2g}"
            ),
            "learning_curve": {
                "ceiling": round(curve.ceiling, 3),
                "rate": round(curve.rate, 3),
                "rows_for_human_accuracy": curve.rows_for(ceiling) or "not reached by the fit",
            },
            "workflow": workflow,
        }
        perfect = workflow["faultless coder"]
        return Measurement(
            figures,
            holds=tuned.macro_f1 >= before.macro_f1 + 0.20
            and monotone
            and perfect["clicks_ratio"] <= 0.6
            and perfect["quality_ratio"] >= 0.95,
            seeds=(seed,),
            note=note,
            plots=(_curve_plot(curve.plot, before.accuracy, ceiling),),
        )


class Bench:
    """The default model with an adapter that is trained and asked."""

    def __init__(self) -> None:
        loaded = models.load(models.DEFAULT, dtype="float32", device="cpu")
        self._task = ClassificationTask(LABELS, prompt=PROMPT)
        self._template = Template("raw", loaded.tokenizer)
        self._model: Any = adapters.build("lora", loaded.network, **ADAPTER)
        self._asker = Asker(
            self._model, loaded.tokenizer, self._template, self._task, context=128, answer_tokens=8
        )

    def labels(self, texts: Sequence[RatedText]) -> list[str]:
        """The most probable label of each text."""
        return self._asker.scores([text.text for text in texts]).best

    def train(
        self,
        texts: Sequence[RatedText],
        seed: int,
        at_size: Callable[[int], Any],
        progress: Progress,
    ) -> None:
        """One pass over the texts in order; ``at_size`` is called after each of the sizes."""
        items = []
        for text in texts:
            (rendered,) = self._task.render({"text": text.text, "label": text.label})
            items.append((self._template.example(rendered),))
        options = TrainOptions(steps=len(items) // 8, seed=seed, precision="fp32", **OPTIONS)
        objective = LanguageObjective.from_options(Causal(), options)
        hook = _AtSizes(at_size, progress)
        Trainer(self._model, objective, options, items, hooks=[hook]).fit()


class _AtSizes(Hook):
    """Tests the model whenever it has seen one of the sizes."""

    def __init__(self, test: Callable[[int], Any], progress: Progress) -> None:
        self._test = test
        self._progress = progress

    def after_step(self, trainer: Any, report: Any) -> None:
        rows = report.step * 8
        self._progress(f"trained on {rows} of {TRAIN} rows", 0.15 + 0.8 * rows / TRAIN)
        if rows in SIZES:
            self._test(rows)


def _texts(progress: Progress, seed: int) -> tuple[list[RatedText], str]:
    note = (
        "Rated texts of VADER (Hutto and Gilbert, 2014): four domains in equal parts, at most "
        f"{LONGEST} characters. The learning curve is one run, tested after n rows. Clicks: one a "
        "row for full assignment; one a rejected label, one a page of 20 and one a row without a "
        "right proposal for rejection. "
    )
    try:
        texts = rated_texts(progress)
    except DataError as error:
        note = f"MADE TEXTS, figures say nothing about language: {error} "
        texts = made_texts(4 * (TRAIN + TEST), seed)
    kept = [text for text in texts if len(text.text) <= LONGEST]
    unique = {text.text: text for text in kept}  # a few texts come twice
    return list(unique.values()), note


def _tfidf(train: Sequence[RatedText], test: Sequence[RatedText]) -> list[str]:
    """Words and pairs of words, weighted, and logistic regression: the classical baseline."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise MissingExtra("scikit-learn", "train") from None
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(max_iter=1000, C=10.0),
    )
    classifier.fit([text.text for text in train], [text.label for text in train])
    return [str(label) for label in classifier.predict([text.text for text in test])]


def _workflow(texts: Sequence[RatedText], seed: int) -> dict[str, Any]:
    """Clicks and quality of rejection over those of full assignment, for two coders."""
    truth = {text.text: text.label for text in texts}
    usual = 1 - human_ceiling([t.ratings for t in texts], [t.label for t in texts])
    found = {}
    for name, error in (("faultless coder", 0.0), ("coder as a single rater", usual)):
        full = full_assignment(truth, LABELS, error, seed)
        ours = rejection(truth, LABELS, LABELLERS, error, seed)
        found[name] = {
            "clicks_ratio": round(ours.clicks / full.clicks, 3),
            "quality_ratio": round(ours.quality / full.quality, 3),
            "quality": round(ours.quality, 3),
            "labels_judged_a_row": round(ours.judged / len(truth), 2),
            "coder_error": round(error, 3),
        }
    return found


def _interval(truth: Sequence[str], said: Sequence[str], seed: int) -> list[float]:
    found = interval(_accuracy, truth, said, seed)
    return [round(found.low, 3), round(found.high, 3)]


def _accuracy(truth: Sequence[str], said: Sequence[str]) -> float:
    return sum(t == s for t, s in zip(truth, said, strict=True)) / len(truth)


def _curve_plot(plot: Callable[..., Plot], zero_shot: float, ceiling: float) -> Plot:
    return plot(
        "accuracy on 250 test rows", levels={"one human rater": ceiling, "zero-shot": zero_shot}
    )
