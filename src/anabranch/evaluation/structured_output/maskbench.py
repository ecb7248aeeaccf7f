"""MaskBench: does a constraint accept all valid instances and no invalid one, and how fast.

Equality of two languages cannot be decided, so it is approximated from both sides: the instances
that come with a schema are walked token by token, and answers drawn at random from the masks,
which no instance of the data set resembles, are given to the validator. No model is needed.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from anabranch.errors import ConstraintTooComplex, InvalidConstraint, RequestFailed
from anabranch.evaluation.structured_output.cases import SchemaCase
from anabranch.evaluation.structured_output.judge import Judge, Undecided
from anabranch.models.constraint import OutputConstraint
from anabranch.serving.constraints import ConstraintCompiler, ConstraintState
from anabranch.serving.constraints.vocabulary import unpack

Outcome = Literal["passed", "refused", "timeout", "crash", "over-constrained", "under-constrained"]
"""``refused``: not declared as supported, with a reason. ``over-constrained``: a valid instance is
rejected; harmless for validity. ``under-constrained``: an invalid one is accepted or drawn."""

MASKS_TIMED = 400
"""Per case: the tails of all cases together are what is reported."""
WALK_TOKENS = 96


@dataclass(frozen=True)
class CaseResult:
    """What one back-end did with one schema. Times in seconds."""

    name: str
    dataset: str
    category: str
    backend: str
    outcome: Outcome
    reason: str = ""
    keyword: str = ""
    """Which keyword was refused, where the back-end says so."""
    compile_seconds: float | None = None
    first_mask_seconds: float | None = None
    mask_seconds: tuple[float, ...] = field(default=(), repr=False)
    instances: int = 0
    disputed: int = 0
    """Instances whose label the validator contradicts, for example where a format is asserted."""
    drawn: int = 0
    """Random answers that came to an end and were validated."""


def run_case(
    case: SchemaCase, compiler: ConstraintCompiler, backend: str, draws: int = 2, seed: int = 0
) -> CaseResult:
    """One schema through one back-end."""
    names = (case.name, case.dataset, case.category, backend)
    began = time.perf_counter()
    try:
        compiled = compiler.compile(OutputConstraint.json_schema(case.schema))
    except ConstraintTooComplex as error:
        timeout = "within" in str(error)
        return CaseResult(*names, "timeout" if timeout else "refused", reason=str(error))
    except InvalidConstraint as error:
        return CaseResult(
            *names, "refused", reason=str(error), keyword=getattr(error, "keyword", "")
        )
    compile_seconds = time.perf_counter() - began
    row = np.zeros(compiler.vocabulary.words, dtype=np.int32)
    began = time.perf_counter()
    compiled.start().fill_mask(row)
    first_mask = time.perf_counter() - began

    judge = Judge(case.schema)
    disputed = drawn = 0
    over = under = ""
    times: list[float] = []
    for instance in case.instances:
        text = json.dumps(instance.data, ensure_ascii=False)
        if not agrees(judge, text, instance.valid):
            disputed += 1
            continue
        try:
            accepted = accepts(compiled.start(), compiler.vocabulary.encode(text), row, times)
        except RequestFailed as error:
            over = over or f"{error}: {text[:200]}"
            continue
        if instance.valid and not accepted:
            over = over or f"valid, but rejected: {text[:200]}"
        if accepted and not instance.valid:
            under = under or f"invalid, but accepted: {text[:200]}"
    generator = random.Random(f"{seed}/{case.name}")
    for _ in range(draws):
        try:
            drawn_text = draw(compiled.start(), compiler, row, generator)
        except RequestFailed as error:
            over = over or str(error)
            continue
        if drawn_text is not None:
            try:
                why = judge.error(drawn_text)
            except Undecided:
                continue
            drawn += 1
            if why is not None:
                under = under or f"drawn, but {why[:200]}: {drawn_text[:200]}"
    outcome: Outcome = "under-constrained" if under else "over-constrained" if over else "passed"
    return CaseResult(
        *names,
        outcome,
        reason=under or over,
        compile_seconds=compile_seconds,
        first_mask_seconds=first_mask,
        mask_seconds=tuple(times[:MASKS_TIMED]),
        instances=len(case.instances),
        disputed=disputed,
        drawn=drawn,
    )


def agrees(judge: Judge, text: str, valid: bool) -> bool:
    """Whether the validator confirms a label."""
    try:
        return (judge.error(text) is None) == valid
    except Undecided:
        return False


def accepts(state: ConstraintState, tokens: list[int], row: np.ndarray, times: list[float]) -> bool:
    """Whether a state goes along with all tokens to a complete answer; appends mask times."""
    for token in tokens:
        began = time.perf_counter()
        state.fill_mask(row)
        times.append(time.perf_counter() - began)
        allowed = bool(row[token // 32] >> (token % 32) & 1)
        if state.accept(token) != allowed:
            raise RequestFailed(f"the mask and accept() disagree about token {token}")
        if not allowed:
            return False
    return state.complete


def draw(
    state: ConstraintState,
    compiler: ConstraintCompiler,
    row: np.ndarray,
    generator: random.Random,
) -> str | None:
    """A random answer, or None if it did not end in :data:`WALK_TOKENS` tokens.

    Every other token is the shortest possible: uniform ones would hardly ever close a string.
    """
    vocabulary = compiler.vocabulary
    written: list[bytes] = []
    for _ in range(WALK_TOKENS):
        state.fill_mask(row)
        tokens = unpack(row & vocabulary.text_mask)
        if state.complete and (not len(tokens) or generator.random() < 0.3):
            # Byte tokens can spell what is no text; a decoder would replace it.
            return b"".join(written).decode(errors="surrogateescape")
        token = int(tokens[generator.randrange(len(tokens))])
        if len(written) > 2 and generator.random() < 0.5:
            few = tokens[:64]
            token = min(
                map(int, few), key=lambda t: (len(vocabulary.tokens[t]), generator.random())
            )
        if not state.accept(token):
            raise RequestFailed(f"the mask and accept() disagree about token {token}")
        written.append(vocabulary.tokens[token])
    return None
