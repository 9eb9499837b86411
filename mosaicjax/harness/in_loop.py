"""Tasks in the training loop: the weights as they are, scored every so many steps."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from mosaicjax import processes
from mosaicjax.adapters import merged
from mosaicjax.errors import InputError
from mosaicjax.generate import Generator
from mosaicjax.harness.lm import language_model
from mosaicjax.harness.score import Scorer
from mosaicjax.harness.subject import Settings
from mosaicjax.harness.tasks import Wanted, configure, evaluate_one, load_tasks
from mosaicjax.models.decoder import Decoder
from mosaicjax.recipe import Recipe
from mosaicjax.report.shown import metrics_of
from mosaicjax.run import Ready


class Live:
    """A `Subject` whose weights change: what is compiled for the first ones serves all."""

    def __init__(self, ready: Ready) -> None:
        recipe = ready.recipe
        self.tokenizer = ready.data.tokenizer
        self.length = recipe.last.seq
        layout = ready.step.layout
        self.settings = Settings(batch=layout.batch_shards * -(-recipe.tasks.batch // layout.batch_shards))
        self.weights: Any = None
        self._ready = ready

    @cached_property
    def _scorer(self) -> Scorer:
        ready = self._ready
        dtypes, rows = ready.recipe.dtypes, self.settings.batch
        return Scorer(ready.decoder, self.weights, ready.step.layout, dtypes, length=self.length, rows=rows)

    @property
    def scorer(self) -> Scorer:
        """What gives log-likelihoods."""
        self._scorer.weights = self.weights
        return self._scorer

    @cached_property
    def _generator(self) -> Generator:
        ready = self._ready
        assert isinstance(ready.decoder, Decoder), "checked"
        dtypes = ready.recipe.dtypes
        return Generator(ready.decoder, self.weights, ready.step.layout, dtypes, self.tokenizer)

    @property
    def generator(self) -> Generator:
        """What writes."""
        self._generator.weights = self.weights
        return self._generator


class InLoop:
    """The scores of a recipe's tasks for the weights of the moment, by `task/metric`."""

    def __init__(self, ready: Ready) -> None:
        """Load the tasks.

        Raises:
            InputError: several processes, a module of one's own, no lm-eval, or tasks that cannot be loaded.
        """
        if not isinstance(ready.decoder, Decoder):
            raise InputError(
                "tasks of the recipe with a module of one's own", fix="none, or `mosaicjax eval`"
            )
        self._live, self._wanted = Live(ready), wanted(ready.recipe)
        # Its subject's interface is all that it asks for.
        subject: Any = self._live
        self._model = language_model(subject, self._wanted.seed)
        self._tasks = load_tasks(self._wanted)["tasks"]
        for task in self._tasks.values():
            configure(task, self._wanted)

    def __call__(self, weights: Any) -> dict[str, float]:
        """Score these weights, those that the model is used with; adapters are added first."""
        self._live.weights = merged(weights)
        found: dict[str, float] = {}
        for name, task in self._tasks.items():
            results = evaluate_one(self._model, task, self._wanted)["results"][name]
            found |= {f"{name}/{metric}": value for metric, value, _ in metrics_of(results)}
        self._live.weights = None
        return found


def wanted(recipe: Recipe) -> Wanted:
    """What a recipe asks for.

    Raises:
        InputError: in a job of several processes.
    """
    if processes.current().count > 1:
        raise InputError(
            "tasks of the recipe in a job of several processes",
            expected="one process",
            fix="tasks.names=(), and `mosaicjax eval` on the run",
        )
    tasks = recipe.tasks
    return Wanted(
        names=tasks.names,
        shots=None if tasks.shots < 0 else tasks.shots,
        limit=tasks.limit,
        seed=recipe.seed,
    )
