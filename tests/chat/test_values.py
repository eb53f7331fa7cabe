"""Values by the words of JSON schema; what the grammar leaves open is decided as documented."""

import json
from typing import Any

import pytest

from tests.chat.tool_rendering import marked
from tests.chat.tool_replies import read_block

NUMBER_OR_LIST = {"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
TREE = {"properties": {"v": {"type": "integer"}, "kids": {"items": {"$ref": "#/$defs/tree"}}}}
CAT = {"properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind"]}
DOG = {"properties": {"kind": {"const": "dog"}, "tail": {"type": "string"}}, "required": ["kind"]}
CITIZEN = {"allOf": [PERSON, {"properties": {"city": {"type": "string"}}}]}
STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def value_of(text: str, schema: Any, **root: Any) -> Any:
    """Of a parameter ``p`` that is written as ``text``."""
    parameters = {"type": "object", "properties": {"p": schema}, **root}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    block = read_block(marked(f'§<invoke name="f">§<p>{text}§</p>§</invoke>'), tools)
    assert (block.repairs, block.content) == ([], "")
    return block.calls[0].arguments["p"]


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        # Strings are as they are written.
        ({"type": "string"}, " a\n", " a\n"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, "", ""),
        ({"type": "string"}, "<b>&lt;</b>", "<b>&lt;</b>"),
        # Scalars.
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, " 5 ", 5),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "integer"}, "5.5", "5.5"),
        ({"type": "integer"}, "five", "five"),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "number"}, "nan", "nan"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "0", False),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "null"}, "null", None),
        ({"type": "null"}, "", None),
        # Names that tool authors write.
        ({"type": "int"}, "5", 5),
        ({"type": "float"}, "5.5", 5.5),
        ({"type": "bool"}, "true", True),
        ({"type": "STRING"}, "5", "5"),
        ({"type": "list", "items": {"type": "int"}}, "§<item>5§</item>", [5]),
        # Several types: the order of the schema decides.
        ({"type": ["string", "integer"]}, "5", "5"),
        ({"type": ["integer", "string"]}, "5", 5),
        ({"type": ["integer", "string"]}, "x", "x"),
        ({"type": ["integer", "null"]}, "null", None),
        ({"type": ["integer", "null"]}, "", None),
        ({"type": "integer", "nullable": True}, "null", None),
        ({"type": "string", "nullable": True}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "5", 5),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, "5", "5"),
        ({"allOf": [{"type": "number"}, {"type": "integer"}]}, "5.0", 5),
        (CITIZEN, "§<age>5§</age>§<city>7§</city>", {"age": 5, "city": "7"}),
        (NUMBER_OR_LIST, "5", 5),
        (NUMBER_OR_LIST, "§<item>5§</item>", [5]),
        # Listed values keep their types.
        ({"enum": ["a", 5, True, None]}, "5", 5),
        ({"enum": ["a", 5, True, None]}, "true", True),
        ({"enum": ["5", 5]}, "5", "5"),
        ({"enum": ["a", 5]}, "b", "b"),
        # Blanks are a text where one may be, and nothing where none may.
        ({"enum": [[], ""]}, " ", []),
        ({"anyOf": [INTEGER, {"enum": [[], ""]}]}, " ", []),
        ({"anyOf": [STRING, {"enum": [[], ""]}]}, " ", " "),
        ({"anyOf": [STRING, {"enum": [[], ""]}]}, "", []),
        ({"anyOf": [{"type": "array", "items": STRING}, {"enum": [[[]]]}]}, "§<item> §</item>", [" "]),
        ({"const": 7}, "7", 7),
        ({"const": {"a": [1]}}, "§<a>§<item>1§</item>§</a>", {"a": [1]}),
        # Empty elements.
        ({"type": "array"}, "", []),
        ({"type": "object"}, "", {}),
        ({"type": ["object", "string"]}, "", ""),
        ({"type": ["array", "object"]}, "", []),
        # Arrays.
        ({"type": "array", "items": {"type": "integer"}}, "§<item>1§</item>§<item>2§</item>", [1, 2]),
        ({"type": "array", "items": {"type": "integer"}}, "§<x>1§</x>§<x>2§</x>", [1, 2]),
        ({"type": "array", "items": {"type": "integer"}}, "[1, 2]", [1, 2]),
        ({"type": "array", "items": {"type": "integer"}}, "5", [5]),
        ({"type": "array", "items": {"type": "string"}}, "§<item>5§</item>§<item>§</item>", ["5", ""]),
        ({"type": "array", "prefixItems": [STRING, INTEGER], "items": {"type": "boolean"}},
         "§<item>1§</item>§<item>1§</item>§<item>1§</item>", ["1", 1, True]),
        ({"type": "array", "items": [STRING], "additionalItems": INTEGER},
         "§<item>1§</item>§<item>1§</item>", ["1", 1]),
        ({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
         "§<item>§<item>1§</item>§</item>§<item>§</item>", [[1], []]),
        # Objects.
        (PERSON, "§<name>5§</name>§<age>5§</age>", {"name": "5", "age": 5}),
        (PERSON, '{"name": "5", "age": 5}', {"name": "5", "age": 5}),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "§<x>5§</x>", {"x": 5}),
        ({"type": "object", "additionalProperties": False}, "§<x>5§</x>", {"x": "5"}),
        ({"type": "object"}, "§<x>5§</x>", {"x": "5"}),
        ({"anyOf": [CAT, DOG]}, "§<kind>dog§</kind>§<tail>7§</tail>", {"kind": "dog", "tail": "7"}),
        ({"anyOf": [CAT, DOG]}, "§<kind>cat§</kind>§<lives>7§</lives>", {"kind": "cat", "lives": 7}),
        # No schema: text; items are a list, other tags an object.
        ({}, "5", "5"),
        (None, "5", "5"),
        (True, "§<item>5§</item>", ["5"]),
        ({}, "§<x>§<item>5§</item>§</x>", {"x": ["5"]}),
        ({}, "", ""),
    ],
)  # fmt: skip
def test_a_value(schema: Any, text: str, value: Any) -> None:
    found = value_of(text, schema)
    # True is not 1, and 5 is not 5.0.
    assert json.dumps(found) == json.dumps(value)


def test_tags_in_a_text_are_text() -> None:
    text = "x§<item>y§</item> z"
    for schema in ({"type": "string"}, {"type": ["string", "null"]}, {"enum": ["a", 5]}, {"const": "x"}):
        assert value_of(text, schema) == marked(text)


def test_references_within_the_schema() -> None:
    tree = "§<v>1§</v>§<kids>§<item>§<v>2§</v>§</item>§</kids>"
    expected = {"v": 1, "kids": [{"v": 2}]}
    for defs in ("$defs", "definitions"):
        schema = json.loads(json.dumps(TREE).replace("$defs", defs))
        assert value_of(tree, {"$ref": f"#/{defs}/tree"}, **{defs: {"tree": schema}}) == expected
    # By another property, escaped, and to nowhere.
    assert value_of("5", {"$ref": "#/properties/q"}, properties2=None) == "5"
    assert value_of("5", {"$ref": "#/$defs/a~1b"}, **{"$defs": {"a/b": {"type": "integer"}}}) == 5
    assert value_of("5", {"$ref": "https://elsewhere/schema"}) == "5"
    assert value_of("5", {"$ref": "#/properties/p"}) == "5"


def test_a_parameter_that_no_tool_has_is_text() -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}},
        }
    ]
    block = read_block(marked('§<invoke name="f">§<a>1§</a>§<b>1§</b>§</invoke>'), tools)
    assert block.calls[0].arguments == {"a": 1, "b": "1"}


def test_bare_functions_are_tools_as_well() -> None:
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}]
    assert read_block(marked('§<invoke name="f">§<a>1§</a>§</invoke>'), tools).calls[0].arguments == {"a": 1}
