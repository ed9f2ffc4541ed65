"""Which answers are found in a text, and which of them are right."""

import json

import pytest

from diffusion.errors import ArgumentError
from diffusion.evaluation.tasks import Example, Task, code, latex, load_task, numbers

SOLUTION = "He has 3 * $<<3*6=18>>18.\n#### 18"


def lines(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (SOLUTION, "18"),
        ("#### 1,234,567", "1234567"),
        ("#### $2,000.00", "2000"),
        ("#### 18.0\nQuestion: 4", "18"),
        ("#### -7", "-7"),
        ("####-$7.50", "-7.5"),
        ("#### 18\n#### 19", "18"),
        ("#### none", None),
        (r"so \boxed{42} and 3 more", "42"),
        (r"so \boxed{\$1{,}000}", "1000"),
        ("The answer is 5. There were 7.", "5"),
        ("Answer: $12.", "12"),
        ("3 apples and 4 pears are 7.", "7"),
        ("pages 2-3", "3"),
        ("5 - 8 = -3", "-3"),
        ("1, 2, 3", "3"),
        (".50 of it", "0.5"),
        ("007", "7"),
        ("no numbers", None),
        ("", None),
    ],
)
def test_the_number_of_a_solution(text, number):
    assert numbers.extract_number(text) == number


@pytest.mark.parametrize("spelled", ["1000", "1,000", "$1000", "1000.0", "1,000.00", "+1000", "$1,000.", "1000%"])
def test_spellings_of_a_number(spelled):
    assert numbers.is_same_number(spelled, Example("", ("1000",), ""))
    assert numbers.is_same_number("1000", Example("", ("999", spelled), ""))
    assert not numbers.is_same_number(spelled, Example("", ("1001",), ""))


def test_the_numbers_of_the_arithmetic_of_python():
    for value in (0, 1, -3, 12, 1_234, 99_999_999, 10):
        assert numbers.normalized_number(f"{value:,}") == numbers.normalized_number(f"{value}.000") == str(value)
    assert numbers.normalized_number("-0.0") == "0"
    assert numbers.normalized_number("1e999999999") == "1e999999999"  # no number of ours: not written out


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{1}, then $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\left\{ x : \{x\} = 1 \right\}}", r"\left\{ x : \{x\} = 1 \right\}"),
        (r"\boxed {3}", "3"),
        (r"\fbox{4}", "4"),
        (r"\boxed 7$", "7"),
        (r"\boxed{1} and \boxed{2", "1"),
        ("nothing", None),
    ],
)
def test_what_is_boxed(text, boxed):
    assert latex.last_boxed(text) == boxed


def test_the_final_answer_without_a_box():
    assert latex.extract_boxed("The final answer is $x=3$. I hope it is correct.") == "$x=3$"
    assert latex.extract_boxed("nothing") is None


SAME = [
    (r"\frac12", r"\frac{1}{2}"),
    (r"\frac1{2}", r"\dfrac{1}{2}"),
    (r"\frac{1}2", "1/2"),
    ("0.5", r"\tfrac{1}{2}"),
    (".5", "0.50"),
    (r"-\frac{6}{4}", "-1.5"),
    ("-3/4", r"-\frac{3}{4}"),
    ("1,000", "1000"),
    ("10{,}000", "10000"),
    (r"\$18.90", "18.9"),
    (r"50\%", "50"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"5\text{ cm}", "5"),
    (r"36\mbox{ cm}^2", "36"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"x=7", "7"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    (r"2\sqrt3", r"2\sqrt{3}"),
    ("12.", "12"),
    (r"\!1\,2", "12"),
    ("p - q", "p-q"),
    ("7.0", "7"),
]
OTHER = [
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    ("(1,234)", "(1234)"),
    ("1,2", "12"),
    ("-1", "1"),
    (r"\sqrt{2}", "2"),
    ("x+1", "x-1"),
    (r"\frac{1}{0}", "0"),
    ("", "0"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spellings_of_an_expression(one, other):
    assert latex.is_same_expression(one, Example("", (other,), ""))
    assert latex.is_same_expression(other, Example("", (one,), ""))


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_other_expressions(one, other):
    assert not latex.is_same_expression(one, Example("", (other,), ""))


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nIt is 1.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1\n".strip()),
        ("def f():\n    return 1\n```\nText ```\nmore```", "def f():\n    return 1\n"),
        ("  \n", None),
    ],
)
def test_the_program_in_a_text(text, program):
    assert code.extract_code(text) == program


def test_a_program_passes_its_tests_or_does_not():
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    assert code.passes_tests("def add(a, b):\n    return a + b", tests)
    assert not code.passes_tests("def add(a, b):\n    return a - b", tests)
    assert not code.passes_tests("def add(a, b:", tests)
    assert not code.passes_tests("", tests)
    assert code.passes_tests("x = 1", ["assert x == y"], setup="y = 1")


ESCAPES = {
    "ends before its tests": "import sys\nsys.exit(0)",
    "ends the process": "import os\nos._exit(0)",
    "prints what a report may look like": "print('passed'); raise SystemExit(0)",
    "raises what ends a program": "def add(a, b):\n    raise KeyboardInterrupt",
    "runs for ever": "while True:\n    pass",
    "sleeps": "import time\ntime.sleep(60)",
    "takes memory": "add = lambda a, b: [0] * (1 << 33) and a + b",
    "reads its input": "add = lambda a, b: int(input())",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_program_that_misbehaves_has_not_passed(name):
    timeout = 1.0 if name in ("runs for ever", "sleeps") else 10.0
    assert not code.passes_tests(ESCAPES[name], ["assert add(1, 2) == 3"], timeout=timeout, memory=256)


def test_a_program_has_a_folder_and_an_environment_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "precious")
    monkeypatch.chdir(tmp_path)
    program = "import os\nopen('mine', 'w').write('x')\nfound = os.environ.get('SECRET'), os.listdir('.')"
    assert code.passes_tests(program, ["assert found == (None, ['mine'])"])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not code._isolation(), reason="needs unshare(1) and namespaces that a user may make")
def test_a_program_has_no_network():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=2)"
        assert not code.passes_tests(connect, ["assert True"])
        assert code.passes_tests(
            f"try:\n    exec({connect!r})\n    reached = True\nexcept OSError:\n    reached = False",
            ["assert not reached"],
        )


def test_programs_run_only_when_that_is_allowed(tmp_path):
    record = {"text": "Add.", "code": "def add(a, b):\r\n    return a + b", "test_list": ["assert add(1, 2) == 3"]}
    path = lines(tmp_path / "mbpp.jsonl", record)
    with pytest.raises(ArgumentError, match="allow_code_execution: expected True"):
        load_task("mbpp", data=path)
    task = load_task("mbpp", data=path, allow_code_execution=True)
    (example,) = task.examples
    assert task.judged("def add(a, b): return a + b\n```", example) == ("def add(a, b): return a + b\n", True)
    assert task.judged("def add(a, b): return a * b", example)[1] is False
    assert task.judged(" ", example) == (None, False)
    assert task.prompt(example).endswith("Add.\nIt has to pass these tests:\nassert add(1, 2) == 3\n```python\n")
    with pytest.raises(ArgumentError, match="line 1: expected a list of tests"):
        load_task("mbpp", data=lines(path, record | {"test_list": []}), allow_code_execution=True)


def test_a_task_of_a_file(tmp_path):
    records = [
        {"prompt": "2+2=", "answer": 4},
        {"prompt": "a?", "answer": ["b", "c d"]},
        {"prompt": "x", "answer": "y"},
    ]
    path = lines(tmp_path / "mine.jsonl", *records)
    task = load_task(str(path), shots=1, shots_data=lines(tmp_path / "shots.jsonl", {"prompt": "1+1=", "answer": 2}))
    assert task.name == "mine"
    assert task.prompt(task.examples[0]) == "1+1= 2\n\n2+2="
    assert task.judged(" 4\n", task.examples[0]) == ("4", True)
    assert task.judged("c  d", task.examples[1])[1]
    assert not task.judged("b or c", task.examples[1])[1]
    assert task.messages(task.examples[0]) == [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2="},
    ]
    found = load_task(str(path), answer_pattern=r"<(.*?)>", template="Q {question} A", limit=2)
    assert len(found.examples) == 2
    assert found.prompt(found.examples[0]) == "Q 2+2= A"
    assert found.judged("<3>, no: <4>.", found.examples[0]) == ("4", True)
    assert found.judged("4", found.examples[0]) == (None, False)


def test_the_form_of_gsm8k_and_math(tmp_path):
    path = lines(tmp_path / "g.jsonl", {"question": "How many?", "answer": SOLUTION})
    task = load_task("gsm8k", data=path, shots=1, shots_data=path)
    assert task.prompt(task.examples[0]) == f"Question: How many?\nAnswer: {SOLUTION}\n\nQuestion: How many?\nAnswer:"
    assert task.judged(SOLUTION, task.examples[0]) == ("18", True)
    record = {"problem": "Half?", "solution": r"It is \boxed{\frac12}."}
    task = load_task("math500", data=lines(path, record))
    assert task.examples[0].answers == (r"\frac12",)
    assert task.judged(r"\boxed{0.5}", task.examples[0]) == ("0.5", True)


def test_mistakes_in_data_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    cases = [
        ("gsm8k", '{"question": "q"}\n', "key 'answer'"),
        ("gsm8k", '{"question": "q", "answer": "18"}\n', "expected #### before the number"),
        ("gsm8k", "[]\n", "expected an object"),
        ("gsm8k", "{\n", "line 1"),
        ("gsm8k", "\n\n", "without one"),
        ("math500", '{"problem": "q", "solution": "s"}\n', "key 'answer'"),
    ]
    for name, content, message in cases:
        path.write_text(content)
        with pytest.raises(ArgumentError, match=message):
            load_task(name, data=path)
    path.write_text('{"prompt": "p", "answer": null}\n')
    with pytest.raises(ArgumentError, match="expected a text, got None"):
        load_task(str(path))
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ArgumentError, match="cannot be read"):
        load_task(str(tmp_path / "b.jsonl.gz"))
    for arguments, message in (
        ({"name": "gsm9k"}, "task: expected one of gsm8k, math500, mbpp"),
        ({"name": str(path), "data": path}, "data: expected none"),
        ({"name": str(tmp_path / "missing.jsonl")}, "cannot be read"),
        ({"name": "gsm8k", "data": path, "answer_pattern": "a"}, "answer_pattern: expected none"),
        ({"name": "gsm8k", "data": path, "limit": 0}, "limit: expected"),
    ):
        with pytest.raises(ArgumentError, match=message):
            load_task(**arguments)
    path.write_text('{"prompt": "p", "answer": "a"}\n')
    for options, message in (
        ({"shots": 1}, "shots_data: expected a file"),
        ({"shots": 2, "shots_data": path}, "shots: expected at most 1"),
        ({"template": "no place"}, "template: expected"),
        ({"answer_pattern": "("}, "answer_pattern: expected a regular expression"),
    ):
        with pytest.raises(ArgumentError, match=message):
            load_task(str(path), **options)


def test_a_conversation_needs_a_tokenizer_that_has_them():
    from diffusion.evaluation.tasks.task import encoded

    class Chatty:
        def apply_chat_template(self, messages, *, add_generation_prompt):
            assert add_generation_prompt
            return "".join(f"<{message['role']}>{message['content']}" for message in messages)

        def encode(self, text, *, special=False):
            return [text, special]

    task = Task(name="t", examples=(), template="{question}", extract=str, is_right=lambda a, b: True)
    example = Example("q", ("a",), "a")
    assert encoded(task, example, Chatty(), chat=True) == ["<user>q", True]
    assert encoded(task, example, Chatty()) == ["q", False]
    with pytest.raises(ArgumentError, match="chat: expected a tokenizer with a chat template"):
        encoded(task, example, object(), chat=True)
