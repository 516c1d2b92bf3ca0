from mlxterp.loading import DEMO
from mlxterp.sae.labels.labelers import Answer, Function, Limits, LocalModel


def test_a_model_in_this_process_answers_greedily(demo):
    labeler = LocalModel((demo.model, demo.tokenizer), name="demo", max_tokens=6)
    prompt = "import os\nimport"
    first, again = labeler.ask([prompt, prompt])
    expected = demo.generate(prompt, max_tokens=6).text
    assert first == again and first.text == expected and first.text
    assert first.n_tokens == len(demo.encode(prompt)) + 6


def test_chat_templates_are_used_and_thinking_is_turned_off(demo):
    class Templated:
        chat_template = "there is one"

        def __init__(self):
            self.asked = []

        def apply_chat_template(self, messages, **options):
            self.asked.append((messages, options))
            return [1, 2, 3]

        def __getattr__(self, name):
            return getattr(demo.tokenizer, name)

    tokenizer = Templated()
    (answer,) = LocalModel((demo.model, tokenizer), name="x", max_tokens=2).ask(["hello"])
    assert answer.error == "" and answer.n_tokens == 3 + 2
    ((messages, options),) = tokenizer.asked
    assert messages == [{"role": "user", "content": "hello"}]
    assert options["add_generation_prompt"] and options["enable_thinking"] is False


def test_what_a_function_raises_is_a_reason():
    def fails(prompt):
        raise TimeoutError(f"no time for {prompt}")

    assert Function(fails).ask(["a", "b"])[1] == Answer(error="TimeoutError: no time for b")
    (answer,) = Function(lambda prompt: None, name="nothing").ask(["a"])
    assert answer.error == "the answer must be a str, got NoneType"


def test_functions_get_the_prompt_or_messages():
    assert Function(str.upper).ask(["a"])[0].text == "A"
    chat = Function(lambda messages: messages[0]["role"] + messages[0]["content"], messages=True)
    assert chat.ask(["a"])[0].text == "usera"
    assert Function(str.upper).name == "str.upper" and Function(str.upper, name="x").name == "x"


def test_limits_allow_whole_groups_from_the_first_on():
    who = Function(str.upper, max_tokens=10)
    groups = [["x" * 35] * 2, ["x"], ["x" * 35]]  # 40, 10 and 20 tokens at most
    assert Limits().allow(who, groups) == 3
    assert Limits(requests=3).allow(who, groups) == 2
    assert Limits(requests=1).allow(who, groups) == 0
    assert Limits(tokens=50).allow(who, groups) == 2
    limits = Limits(requests=4, tokens=100)
    limits.spend([Answer("a", n_tokens=30), Answer(error="b")])
    assert (limits.requests, limits.tokens) == (2, 70)


def test_a_model_is_loaded_by_its_path_once_it_is_asked():
    labeler = LocalModel(str(DEMO), name="demo")
    assert labeler.name == "demo" and LocalModel(str(DEMO)).name == str(DEMO)
    (answer,) = labeler.ask(["class"])
    assert answer.text and not answer.error
