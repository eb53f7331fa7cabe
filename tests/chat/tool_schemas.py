"""Random tools, and arguments that fit their schemas."""

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from hypothesis import reject
from hypothesis import strategies as st

from tests.chat.tool_values import KEYS, NS, SCALARS, STRINGS, TOOL_NAMES, Alternative, Shape, carried, pruned

SPELLINGS = {
    "string": ["string", "string", "str", "String"],
    "integer": ["integer", "integer", "int"],
    "number": ["number", "number", "float", "double"],
    "boolean": ["boolean", "boolean", "bool"],
    "array": ["array", "array", "list"],
    "object": ["object", "object", "dict", "OBJECT"],
    "null": ["null"],
}


class Maker:
    """Draws one tool.  Schemas grow to ``depth``; references are collected in ``definitions``."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]):
        self.draw = draw
        self.definitions: dict[str, Any] = {}

    def coin(self) -> bool:
        return bool(self.draw(st.booleans()))

    def pick(self, options: list[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def value(self, shape: Shape, depth: int, member: bool = False) -> Any:
        for _ in range(8):
            index = self.draw(st.integers(0, len(shape.alternatives) - 1))
            value = shape.alternatives[index].value(depth)
            if (member and value is None) or carried(shape.alternatives, index, value):
                return value
        return reject()

    def shape(self, depth: int) -> Shape:
        kinds = [self.scalar, self.scalar, self.listed, self.anything]
        if depth > 0:
            kinds += [self.array, self.array, self.object, self.object, self.union, self.union, self.narrowed]
            kinds += [self.tagged, self.recursive]
        return self.dressed(self.pick(kinds)(depth))

    def dressed(self, shape: Shape) -> Shape:
        """The same shape, said in another way."""
        schema, alternatives = shape.schema, shape.alternatives
        how = self.pick(["", "", "", "$ref", "allOf", "nullable", "anyOf"])
        if how == "$ref":
            schema = self.reference(schema)
        elif how == "allOf":
            schema = {"allOf": [schema, {"description": "d"}][:: self.pick([1, -1])]}
        elif how == "anyOf":
            schema = {"description": "d", "oneOf": [schema]}
        elif how == "nullable" and [a.kind for a in alternatives] != ["anything"]:
            schema = {**schema, "nullable": True}
            alternatives = [*alternatives, Alternative("null", lambda _: None)]
        return Shape(schema, alternatives)

    def reference(self, schema: Any) -> dict[str, Any]:
        name = self.pick(["A", "a/b", "t~1", "Äx", "50%"]) + str(len(self.definitions))
        self.definitions[name] = schema
        pointer = name.replace("~", "~0").replace("/", "~1")
        return {"$ref": "#/$defs/" + (quote(pointer) if self.coin() or "%" in pointer else pointer)}

    def type(self, kind: str) -> str:
        return self.pick(SPELLINGS[kind])

    def scalar(self, depth: int) -> Shape:
        kind = self.pick([*SCALARS])
        return Shape({"type": self.type(kind)}, [Alternative(kind, lambda _: self.draw(SCALARS[kind]))])

    def anything(self, depth: int) -> Shape:
        """No schema: texts, lists and objects that are not empty."""
        schema = self.pick([{}, {"description": "d"}, True, {"type": "any"}])
        return Shape(schema, [Alternative("anything", self.untyped)])

    def untyped(self, depth: int) -> Any:
        kind = self.pick(["text", "list", "object"]) if depth > 0 else "text"
        if kind == "list":
            return [self.untyped(depth - 1) for _ in range(self.draw(st.integers(1, 3)))]
        if kind == "object":
            value = {key: self.untyped(depth - 1) for key in self.keys(1)}
            return value if set(value) != {"item"} else self.untyped(0)
        # The word null is null where nothing says that it is a string.
        return self.draw(STRINGS.filter(lambda text: text.strip() != "null"))

    def listed(self, depth: int) -> Shape:
        listed = self.draw(st.lists(st.one_of(*SCALARS.values()), min_size=1, max_size=4))
        if depth > 0 and self.coin():
            shape = self.dressed(self.pick([self.array, self.object])(0))
            listed.insert(self.draw(st.integers(0, len(listed))), pruned(self.value(shape, 1)))
        kind = {
            str: "string",
            int: "integer",
            float: "number",
            bool: "boolean",
            list: "array",
            dict: "object",
        }
        only = {kind.get(type(value), "null") for value in listed}
        schema: dict[str, Any] = {"enum": listed}
        if self.coin():
            schema, listed = {"const": listed[0]}, listed[:1]
        # Without a type, no other text belongs to them.
        alternative = Alternative("listed", lambda _: self.pick(listed), listed)
        if len(only) == 1 and self.coin():
            alternative.kind = only.pop()
            schema["type"] = self.type(alternative.kind)
            alternative.allows_item = alternative.kind == "object"
        return Shape(schema, [alternative])

    def array(self, depth: int) -> Shape:
        schema: dict[str, Any] = {"type": self.type("array")}
        first = [self.shape(depth - 1) for _ in range(self.draw(st.integers(0, 2)))]
        items = self.shape(depth - 1)
        if first and self.coin():
            schema |= {"items": [shape.schema for shape in first], "additionalItems": items.schema}
        elif first:
            schema |= {"prefixItems": [shape.schema for shape in first], "items": items.schema}
        else:
            schema["items"] = items.schema
            if self.coin():
                del schema["type"]

        def value(depth: int) -> list[Any]:
            length = self.draw(st.integers(0, 3)) if depth > 0 else 0
            return [self.value([*first, *[items] * length][i], depth - 1) for i in range(length)]

        return Shape(schema, [Alternative("array", value)])

    def keys(self, least: int = 0) -> list[str]:
        return self.draw(st.lists(KEYS, unique=True, min_size=least, max_size=3))

    def object(self, depth: int) -> Shape:
        shapes = {key: self.shape(depth - 1) for key in self.keys()}
        schema: dict[str, Any] = {"type": self.type("object")}
        schema["properties"] = {key: shape.schema for key, shape in shapes.items()}
        required = [key for key in shapes if self.coin()]
        if required or self.coin():
            schema["required"] = required
        extra = self.pick([None, None, False, "anything", "typed"])
        if extra is not None:
            extra = self.shape(depth - 1) if extra == "typed" else self.anything(0) if extra else False
            schema["additionalProperties"] = extra.schema if isinstance(extra, Shape) else extra

        def value(depth: int) -> dict[str, Any]:
            chosen = dict(shapes)
            if isinstance(extra, Shape):
                chosen = dict.fromkeys(self.keys(), extra) | chosen
            return {
                key: self.value(shape, depth - 1, member=True)
                for key, shape in chosen.items()
                if key in required or (depth > 0 and self.coin())
            }

        allows_item = "item" in shapes or isinstance(extra, Shape) or not shapes
        return Shape(schema, [Alternative("object", value, allows_item=allows_item)])

    def recursive(self, depth: int) -> Shape:
        """A tree whose schema refers to itself."""
        own, name = self.shape(depth - 1), f"Node{len(self.definitions)}"
        node = Shape({"$ref": f"#/$defs/{name}"}, [])
        null = Alternative("null", lambda _: None)
        self.definitions[name] = {}

        def value(depth: int) -> dict[str, Any]:
            drawn: dict[str, Any] = {"own": self.value(own, 1, member=True)}
            if depth > 0:
                drawn["next"] = self.value(maybe, depth - 1, member=True)
                drawn["children"] = [self.value(node, depth - 2) for _ in range(self.draw(st.integers(0, 2)))]
                drawn["named"] = {key: self.value(node, depth - 2) for key in self.keys()}
            return drawn

        node.alternatives.append(Alternative("object", value))
        maybe = Shape({"anyOf": [node.schema, {"type": "null"}]}, [*node.alternatives, null])
        self.definitions[name] = {
            "type": "object",
            "properties": {
                "own": own.schema,
                "next": maybe.schema,
                "children": {"type": "array", "items": node.schema},
                "named": {"type": "object", "additionalProperties": node.schema},
            },
        }
        return node

    # --- several alternatives ---

    def union(self, depth: int) -> Shape:
        shapes = [self.pick([self.scalar, self.scalar, self.listed, self.array])(depth - 1) for _ in range(2)]
        shapes += [self.shape(depth - 1) for _ in range(self.draw(st.integers(0, 1)))]
        shapes = [shape for shape in shapes if shape.alternatives[0].kind != "anything"]
        alternatives = [alternative for shape in shapes for alternative in shape.alternatives]
        if sum(any(each.kind == "object" for each in shape.alternatives) for shape in shapes) > 1:
            # Only members that tell them apart make a union of objects.
            return self.tagged(depth)
        types = [shape.schema.get("type") for shape in shapes if set(shape.schema) == {"type"}]
        if [type(each) for each in types] == [str] * len(shapes) and self.coin():
            return Shape({"type": types}, alternatives)
        return Shape({self.pick(["anyOf", "oneOf"]): [shape.schema for shape in shapes]}, alternatives)

    def narrowed(self, depth: int) -> Shape:
        """What two lists of types have in common, in the order of the first."""
        kinds = self.draw(st.permutations(["string", "integer", "boolean", "null"]))
        first, second = kinds[: self.draw(st.integers(2, 4))], kinds[1:]
        common = [kind for kind in first if kind in second]
        draws = [Alternative(kind, lambda _, kind=kind: self.draw(SCALARS[kind])) for kind in common]
        return Shape({"allOf": [{"type": first}, {"type": second[::-1]}]}, draws)

    def tagged(self, depth: int) -> Shape:
        """Objects of which each has a member of its own, or its own value of a common one."""
        base = {f"base {key}": self.shape(0) for key in self.keys()}
        base_schema = {"properties": {key: shape.schema for key, shape in base.items()}}
        options, alternatives = [], []
        for index in range(self.draw(st.integers(1, 3))):
            by_value = self.coin()
            tag, tag_value = ("kind", f"k{index}") if by_value else (f"only {index}", "x")
            tag_schema = {"const": tag_value, "type": "string"} if by_value else {"type": "string"}
            # The same names in all, with types of their own.
            shapes = {f"member {i}": self.shape(depth - 1) for i in range(self.draw(st.integers(0, 2)))}
            schema = {
                "type": "object",
                "properties": {
                    tag: self.reference(tag_schema) if self.coin() else tag_schema,
                    **{key: shape.schema for key, shape in shapes.items()},
                },
                "required": [tag],
            }
            if self.coin():
                schema = {"allOf": [self.shared(base_schema), schema]}
                shapes = shapes | base

            def value(depth: int, shapes=shapes, tag=tag, tag_value=tag_value) -> dict[str, Any]:
                members = {k: self.value(s, depth - 1, member=True) for k, s in shapes.items() if self.coin()}
                return {tag: tag_value, **members}

            options.append(self.reference(schema) if self.coin() else schema)
            alternatives.append(Alternative("object", value))
        keyword = self.pick(["anyOf", "oneOf"])
        return Shape({keyword: options}, alternatives)

    def shared(self, schema: Any) -> dict[str, Any]:
        """Each time the same reference."""
        self.definitions.setdefault("Base", schema)
        return {"$ref": "#/$defs/Base"} if self.definitions["Base"] is schema else schema


@st.composite
def calls(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[list[Any], list[dict[str, Any]]]:
    """Tools in OpenAI's form, and calls of them."""
    tools, made = [], []
    for name in draw(
        st.lists(TOOL_NAMES.filter(lambda name: NS not in name), min_size=1, max_size=2, unique=True)
    ):
        maker = Maker(draw)
        shape = maker.object(3)
        parameters = {**shape.schema, "$defs": maker.definitions}
        function = {"name": name, "description": "d", "parameters": parameters}
        tools.append(function if draw(st.booleans()) else {"type": "function", "function": function})
        for _ in range(draw(st.integers(1, 2))):
            made.append({"name": name, "arguments": maker.value(Shape(parameters, shape.alternatives), 4)})
    return tools, draw(st.permutations(made))
