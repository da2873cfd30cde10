"""How parts are spread over workers. A strategy is one file here, found by its name, with three things in it:

- `Options`: its settings (`dtrain.component.Options`);
- `check(options, plan_words) -> None`: raises `InputError` for what it cannot do, at plan time;
- `prepare(task, plan, device) -> Engines`: wraps the parts and makes one engine a phase.
"""
