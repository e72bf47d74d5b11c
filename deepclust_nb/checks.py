"""What a chapter's `check` cell calls: parameters are refused before any work, in plain sentences.

The cell is the only place where a chapter's limits stand. The chapter executes it, and a sweep executes the
same cell for each run of its list before the first one starts.
"""

import ast
import difflib

PLAIN = (int, float, str, bool, type(None), list, tuple, dict)


def parameters(namespace, **allowed):
    """Check the values of a chapter's `parameters` cell and give them back as one dictionary.

    The first call in a kernel also refuses a plain-valued global (int, float, str, bool, None, list, tuple,
    dict) that the `parameters` cell or papermill's cell after it sets and that is not declared here: that is
    what a mistyped parameter looks like. Globals from elsewhere, as a startup file's, are nobody's typo. A
    later call on the same namespace skips this part, so that a reader can run the cell again further down.

    Parameters: namespace: `globals()`; allowed: for each parameter a list (one of these; `[True, False]` for
        a bool), or a pair (lo, hi): ints ask for an int within, floats for a float or int within, ends
        included.
    Returns: a dict from name to value, in the order of `allowed`.
    Raises: ValueError with one sentence for each wrong, missing or undeclared parameter.
    """
    problems = [_problem(namespace, name, rule) for name, rule in allowed.items()]
    if "_deepclust_checked" not in namespace:
        written = _written(namespace.get("In", []), allowed)
        plain = {name for name in written if type(namespace.get(name, ...)) in PLAIN and name[0] != "_"}
        strangers = sorted(plain - set(allowed))
        problems += [f"{x} is not a parameter of this chapter{suggestion(x, allowed)}" for x in strangers]
    problems = [problem for problem in problems if problem]
    if problems:
        raise ValueError("\n".join(problems))
    namespace["_deepclust_checked"] = True
    from . import digest

    digest.state()
    return {name: namespace[name] for name in allowed}


def require(holds, sentence):
    """Refuse parameters that are each allowed and do not fit together.

    Raises: ValueError with the sentence when `holds` is false.
    """
    if not holds:
        raise ValueError(sentence)


def keeps_gradients(precision):
    """Whether in this precision a weight keeps its gradient when it was used without one just before.

    In bfloat16 older versions of torch remember the converted weight of the first use, which has no gradient,
    for the second (its issue 112583): whoever takes codes without a gradient and trains on the same images in
    one go then trains nothing, in silence. Parameters: precision: "auto", "float32" or "bfloat16".
    """
    if precision == "float32":
        return True
    import torch

    layer, x = torch.nn.Linear(1, 1), torch.zeros(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            layer(x)
        return layer(x).requires_grad


def suggestion(name, names):
    """The end of a sentence about an unknown name: the closest known one, or all of them."""
    close = difflib.get_close_matches(name, [str(known) for known in names], n=1)
    return f": did you mean {close[0]}?" if close else f"; known are {', '.join(map(str, names))}"


def assigned(source):
    """Assignments at the top of a cell, annotated ones included: (name, syntax tree of the value) pairs."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a cell with IPython's magic
        return []
    pairs = [(node.targets, node.value) for node in body if isinstance(node, ast.Assign)]
    pairs += [([node.target], node.value) for node in body if isinstance(node, ast.AnnAssign)]
    return [(x.id, value) for targets, value in pairs for x in targets if isinstance(x, ast.Name)]


def _written(cells, allowed):
    # IPython keeps the sources of executed cells; papermill's begins with this comment.
    names = [(source, {name for name, _ in assigned(source)}) for source in cells if source]
    ours = [found for source, found in names if source.startswith("# Parameters") or found & set(allowed)]
    return set().union(*ours)


def _problem(namespace, name, rule):
    if name not in namespace:
        return f"{name} is declared here, but the parameters cell does not set it"
    value = namespace[name]
    is_bool = isinstance(value, bool)
    if isinstance(rule, tuple):
        lo, hi = rule
        whole = isinstance(lo, int) and isinstance(hi, int)
        if is_bool or not isinstance(value, int if whole else int | float) or not lo <= value <= hi:
            return f"{name} must be {'an int' if whole else 'a number'} between {lo} and {hi}, got {value!r}"
    # 1 == True in Python, so a bool only matches a bool.
    elif not any(value == option and is_bool == isinstance(option, bool) for option in rule):
        return f"{name} must be one of {', '.join(map(repr, rule))}, got {value!r}"
