"""Parameters are values: nothing in the package writes into a module, or into what somebody else holds."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "gold_jax"
# Where something is written into, and why that harms nobody: (file, function, kind of write).
ALLOWED = {
    # a module during its construction
    ("models/decoder.py", "__init__", "setattr"),
    # numpy arrays that the function itself has made
    ("models/hf_checkpoint.py", "_read", "[...] ="),
    # settings during their construction, and what is set on them by their owner
    ("config/fields.py", "__post_init__", "setattr"),
    ("config/fields.py", "_set", "setattr"),
    ("config/arguments.py", "__post_init__", "setattr"),
    ("loss_spec.py", "__post_init__", "setattr"),
    # frozen dataclasses during their construction
    ("text/encode.py", "__post_init__", "setattr"),
    ("text/surface.py", "__post_init__", "setattr"),
    # copies that the function itself has made
    ("distillation.py", "tree_unflatten", "attribute"),
    ("text/encode.py", "__init__", "attribute"),
    ("text/encode.py", "_hide_pieces", "attribute"),
    ("text/encode.py", "_mark_dropped", "attribute"),
    ("text/encode.py", "_remove_prefix", "attribute"),
    ("text/special_tokens.py", "_with_renamed_special_tokens", "attribute"),
    ("loading.py", "_tokenizer_with_end", "attribute"),
    ("training/export.py", "_save_tokenizer", "attribute"),
    # nodes of a tree that was parsed for this
    ("text/template_budget.py", "visit_For", "attribute"),
    ("text/template_budget.py", "visit_Call", "attribute"),
    ("text/template_budget.py", "visit_CallBlock", "attribute"),
    ("text/template_budget.py", "_block", "attribute"),
    ("text/template_budget.py", "visit_Output", "attribute"),
    # what a server or a conversation makes for one request, and nothing else holds
    ("serving/conversation.py", "_do", "attribute"),
    ("serve.py", "stop_soon", "attribute"),
    ("serve.py", "main", "attribute"),
    ("serving/app.py", "submit", "attribute"),
    ("serving/app.py", "changes", "attribute"),
    ("serving/batcher.py", "cancel", "attribute"),
    ("serving/batcher.py", "_decode", "attribute"),
    ("serving/batcher.py", "_deliver", "attribute"),
    # objects of other libraries that the function itself has made
    ("profiling/capture.py", "trace_steps", "attribute"),
    ("reporting/page.py", "_environment", "attribute"),
    ("reporting/plots.py", "draw", "attribute"),
    ("wording.py", None, "attribute"),
    ("distributed/watchdog.py", "_watch", "attribute"),
}
OWN = ("self", "cls")
MODULE_WRITES = ("set_value", "set_raw_value", "set_metadata", "update_from_state")


def writes(tree):
    """(function, kind, line) of everything that looks like a write into an object."""

    def walk(node, function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        targets = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Subscript) and isinstance(part.ctx, ast.Store):
                    if isinstance(part.slice, ast.Constant) and part.slice.value is Ellipsis:
                        yield function, "[...] =", node.lineno
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    if not (isinstance(part.value, ast.Name) and part.value.id in OWN):
                        yield function, "attribute", node.lineno
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("setattr", "__setattr__"):
                yield function, "setattr", node.lineno
            if name in MODULE_WRITES:
                yield function, name, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(tree, None)


def found():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        for function, kind, line in writes(ast.parse(path.read_text(encoding="utf-8"))):
            yield name, function, kind, line


def test_nothing_is_written_into_but_in_the_places_that_are_named():
    strangers = [
        f"{name}:{line}: {kind} in {function}"
        for name, function, kind, line in found()
        if (name, function, kind) not in ALLOWED
    ]
    assert not strangers, "\n".join(strangers)


def test_every_place_that_is_named_is_still_there():
    assert {(name, function, kind) for name, function, kind, _ in found()} >= ALLOWED


def test_a_module_writes_into_itself_in_its_constructor_alone():
    modules = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "nnx.Module" for base in node.bases)):
                continue
            modules += 1
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                    stored = [
                        n for n in ast.walk(method) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
                    ]
                    assert not stored, f"{path.name}:{method.lineno}: {node.name}.{method.name}"
    assert modules


def test_modules_and_values_are_turned_into_each_other_in_one_place():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "functional.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx":
                assert node.attr not in ("merge", "split", "state", "update", "clone"), f"{path.name}:{node.lineno}"
