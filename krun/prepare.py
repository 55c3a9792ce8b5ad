"""prepare(call) -> Prepared: read, check and translate a bundle; what create and run begin with."""

from __future__ import annotations

import os

from krun import bundle, extension, grammar, host, policy, spec, survey
from krun import translate as translation
from krun.errors import KrunError
from krun.record import Record


class Prepared(Record):
    """A translated bundle."""

    bundle: str
    host: host.Host
    policy: policy.Policy
    choice: extension.Choice
    translation: translation.Translation


def prepare(call: grammar.Call, annotations: dict[str, str] | None = None) -> Prepared:
    """Read what call names and decide what will run.  Raises KrunError."""
    try:
        directory = os.path.abspath(call.options["bundle"])
    except OSError as error:
        text = f"bundle {call.options['bundle']}: the working directory: {error.strerror}"
        raise KrunError(text, "--bundle DIR names the bundle") from error
    document = spec.accept(spec.parse, bundle.load(directory, call.options["config"]))
    if annotations:
        document = {
            **document,
            "annotations": {**(document.get("annotations") or {}), **annotations},
        }
    rules = policy.load(call.settings.policy)
    choice = extension.choose(document, rules, call.settings)
    machine = host.probe(rules)
    if choice.images:
        machine = machine._replace(image_hooks=host.image_hooks())
    notes: list[translation.Note] = []
    facts = survey.survey(document, directory, choice, rules, notes)
    result = translation.translate(document, choice, machine, facts)
    return Prepared(directory, machine, rules, choice, result._replace(notes=notes + result.notes))
