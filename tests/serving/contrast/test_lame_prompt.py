"""Examples go and everything else stays, to the letter."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InvalidRequest
from anabranch.serving.contrast import lame_prompt
from anabranch.serving.contrast.examples import is_example

SIGNATURE = (
    "from typing import List\n\n\ndef second(items: List[int], strict: bool = True) -> int:\n"
)
DESCRIPTION = "Return the second smallest item.\n\nItems may repeat (None if there is no second)."


def python(body: str, quotes: str = '"""') -> str:
    inner = textwrap.indent(body, "    ").lstrip()
    return f"{SIGNATURE}    {quotes}{inner}\n    {quotes}\n"


def commented(body: str, mark: str, signature: str) -> str:
    return "".join(f"{mark} {line}".rstrip() + "\n" for line in body.split("\n")) + signature


def starred(body: str, signature: str) -> str:
    lines = "".join(f" * {line}".rstrip() + "\n" for line in body.split("\n"))
    return f"/**\n{lines} */\n{signature}"


FORMS = {
    "doctest": ">>> second([1, 2])\n2\n>>> second([[1],\n...         [2]])\n[2]",
    "doctest without output": ">>> second([])",
    "headed calls": "Examples:\nsecond([1, 2]) == 2\nsecond([3]) == None",
    "headed, blank lines between": "For example:\n\nsecond([1, 2]) ➞ 2\n\nsecond([3, 4]) ➞ 4",
    "numbered": "Example 1:\n\n    Input: items = [1, 2]\n    Output: 2\n\nExample 2:\n\n"
    "    Input: items = [5, 7]\n    Output: 7\n    Explanation: 7 follows 5",
    "NumPy section": "Examples\n--------\n>>> second([4, 3])\n4",
    "asserts": "assert second([1, 2]) == 2\nassert second(\n    [3, 4]\n) == 4",
    "arrows": "[1, 2] -> 2\n[3, 9] ==> 9\n'ab' => 'b'",
    "calls": "second([1, 2]) => 2\nsecond([0]) should return None\nsecond(items=[5, 6]) = 6",
    "sentence": "For example, the second of [1, 2] is 2, and that of\n[5, 4] is 5.",
    "e.g.": "E.g. for [1, 2] it is 2.",
    "tests": "Your code should pass these tests:\n\nassert second([1, 2]) == 2",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quotes", ['"""', "'''"])
def test_python_docstrings(form: str, quotes: str) -> None:
    text = python(f"{DESCRIPTION}\n\n{FORMS[form]}", quotes)
    assert lame_prompt(text) == python(DESCRIPTION, quotes)


@pytest.mark.parametrize("form", FORMS)
def test_comments_of_other_languages(form: str) -> None:
    body = f"{DESCRIPTION}\n\n{FORMS[form]}"
    javascript = "function second(items, strict = true) {\n"
    java = "public static int second(List<Integer> items) {\n"
    assert lame_prompt(commented(body, "//", javascript), "javascript") == commented(
        DESCRIPTION, "//", javascript
    )
    assert lame_prompt(starred(body, java), "java") == starred(DESCRIPTION, java)
    assert lame_prompt(commented(body, "#", SIGNATURE)) == commented(DESCRIPTION, "#", SIGNATURE)


@pytest.mark.parametrize("form", FORMS)
def test_prose_without_code(form: str) -> None:
    assert lame_prompt(f"{DESCRIPTION}\n\n{FORMS[form]}") == DESCRIPTION


@pytest.mark.parametrize(
    "kept",
    [
        "Args:\n    items: pairs (int, int) -> [int]\n\nReturns:\n    dict: str -> int",
        "f(0) = 1\nf(n) = f(n - 1) + n",
        "second(items: list, n: int = 2) -> None",
        "A list of words, for\nexample names, that are sorted.",
        "Example rows are given as a list.",
        "Note: 1 <= len(items) <= 100",
        "Test whether the input is sorted.",
        "Assert that the input is sorted.",
        "assert that nothing is lost, and raise otherwise",
        "The item -> position mapping is a dictionary.",
        "x = 3 is the limit.",
    ],
)
def test_what_only_looks_like_an_example_stays(kept: str) -> None:
    assert lame_prompt(python(kept)) is None


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Sort it. For example, [2, 1] gives [1, 2]. Ties stay.", "Sort it. Ties stay."),
        ("For example, [2, 1] gives [1, 2]. Ties stay.", "Ties stay."),
        ("f(items: list) -> int\n\nf([2]) -> 2", "f(items: list) -> int"),
        ("f(items: list) = f(rest)\n\nf([2]) == 2", None),
        ("Sort it. For example, [2,\n1] gives [1, 2]. Ties stay.", "Sort it.\nTies stay."),
        (
            "Sort it.\nExample:\nf([2]) == [2]\nTies stay as they are.",
            "Sort it.\nTies stay as they are.",
        ),
        (
            "Sort it.\n\nExamples:\n    f([2, 1]) => [1, 2]\n\nNote:\n    1 <= n",
            "Sort it.\n\nNote:\n    1 <= n",
        ),
    ],
)
def test_what_stands_around_an_example_stays(text: str, rest: str | None) -> None:
    assert lame_prompt(python(text)) == (None if rest is None else python(rest))


def test_an_example_beside_the_quotes() -> None:
    text = 'def f():\n    """>>> f(1)\n    1\n\n    Sort it.\n    >>> f(2)\n    2"""\n'
    assert lame_prompt(text) == 'def f():\n    """\n\n    Sort it.\n    """\n'


def test_jsdoc_tags() -> None:
    example = "@example\nsecond([1, 2]) // 2\n\nsecond([3]) // null"
    body = f"Second smallest.\n{example}\n@param {{int[]}} items"
    signature = "const second = (items) => {\n"
    expected = "Second smallest.\n@param {int[]} items"
    assert lame_prompt(starred(body, signature), "JavaScript") == starred(expected, signature)


def test_code_is_never_touched() -> None:
    table = 'TABLE = """\n>>> f(1)\n1\n"""\n\n'
    code = table + 'def f(x):\n    assert x == 1\n    y = "For example: f(1) == 2"\n'
    assert lame_prompt(code) is None
    assert lame_prompt(code + "\n\nassert f(1) == 2\n") == code


def test_a_docstring_that_was_not_closed() -> None:
    text = SIGNATURE + '    """Second smallest.\n\n    >>> second([1, 2])\n    2\n'
    assert lame_prompt(text) == SIGNATURE + '    """Second smallest.\n'


def test_demonstrations_before_the_last_question() -> None:
    asked = "Q: What is the second of [3, 4]?\nA:"
    shown = "Q: What is the second of [1, 2]?\nA: 2\n\nQ: And of [5, 6]?\nA:\n6\n\n"
    task = "Answer with one number.\n\n"
    assert lame_prompt(task + shown + asked) == task + asked
    assert lame_prompt(task + asked) is None
    specification = "Input: a list\nOutput: its second item\n\nInput: another list\nOutput:"
    assert lame_prompt(specification) == "Input: another list\nOutput:"


def test_the_docstrings_of_demonstrations_lose_their_examples_too() -> None:
    first = python(DESCRIPTION + "\n\n>>> second([1, 2])\n2") + "    return sorted(items)[1]\n\n\n"
    second = python("Other.\n\nother('a') -> 'b'")
    expected = python(DESCRIPTION) + "    return sorted(items)[1]\n\n\n" + python("Other.")
    assert lame_prompt(first + second) == expected


@pytest.mark.parametrize("text", ["", "\n", '"""', "'''\n'''", "/*", "//", "def f():\n", "assert"])
def test_nothing_to_remove(text: str) -> None:
    assert lame_prompt(text) is None
    assert lame_prompt(text, "java") is None


@pytest.mark.parametrize(
    "piece",
    [
        *("f(", "f(1) == ", ")", "E.g. a 1. ", "> ", "/*", '"', "`", "'", " ", "assert (\n", "#\n"),
        *(
            '"""\n',
            "For example, 1\n",
            ">>> f(1)\n",
            "Example:\n",
            "Q: a\nA: 1\n",
            "\n",
            "1 -",
            "async \n",
        ),
    ],
)
@pytest.mark.timeout(30)
def test_no_text_takes_long(piece: str) -> None:
    text = "Sort it.\n\n" + piece * (30_000 // len(piece))
    for language in ("python", "java"):
        lame_prompt(text, language)


def test_an_unknown_language_is_named_with_the_nearest() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'javascript'") as caught:
        lame_prompt("x", "javascrip")
    assert caught.value.field == "contrast.language"


def test_is_example() -> None:
    assert is_example("- is_happy('aa') => False")
    assert not is_example("first(a) => second(b)")


PIECES = st.sampled_from(
    [
        *FORMS.values(),
        DESCRIPTION,
        SIGNATURE,
        *('"""', "'''", "/**", " */", "# ", "// ", " * ", "\n", "\n\n", "    ", '"', "'", "`"),
        *(
            "Example:",
            "For example",
            "Note: x",
            "Q: a",
            "A: b",
            "@example",
            "return 1",
            "assert (",
            ">>>",
        ),
    ]
)


@given(st.lists(PIECES, max_size=12).map("".join), st.sampled_from(["python", "java"]))
@settings(max_examples=400, deadline=None)
def test_of_any_text_only_something_is_left_out_and_once(text: str, language: str) -> None:
    lame = lame_prompt(text, language)
    if lame is None:
        return
    assert len(lame) < len(text)
    rest = iter(text)
    assert all(character in rest for character in lame)  # a subsequence
    assert lame_prompt(lame, language) is None


WORDS = st.lists(
    st.sampled_from(["the", "item", "of", "a", "sorted", "list", "is", "kept", "in", "order"]),
    min_size=2,
)
PARAGRAPH = WORDS.map(lambda words: " ".join(words).capitalize() + ".")


@given(
    st.lists(PARAGRAPH, min_size=1, max_size=3),
    st.lists(st.sampled_from(sorted(FORMS)), min_size=1, max_size=3),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_description_survives_every_example(
    paragraphs: list[str], forms: list[str], notes: bool
) -> None:
    description = "\n\n".join(paragraphs)
    examples = "\n\n".join(FORMS[form] for form in forms)
    end = "\n\nNote:\n    n <= 9" if notes else ""
    text = python(f"{description}\n\n{examples}{end}")
    assert lame_prompt(text) == python(f"{description}{end}")
