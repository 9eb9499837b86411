"""The work of a build as Spark jobs: on this machine, or on the cluster of `spark-submit` or a session."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from mosaicjax import storage
from mosaicjax.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
SCHEMA = "number long, answer binary"
MASTER_BROUGHT = ("PYSPARK_GATEWAY_PORT", "SPARK_REMOTE", "MASTER", "SPARK_CONF_DIR")
"""The environment has one of these where spark-submit, or whoever set it, says where the work is done."""


class Spark:
    """Every task a partition of its own, by `mapInArrow`.

    The session is the active one, or that of spark-submit or of the environment (`MASTER_BROUGHT`); where
    there is none, so many cores of this machine. Executors need mosaicjax, and see sources and store under
    the same names.
    """

    reads_sources = True

    def __init__(self, workers: int) -> None:
        """Begin, or join, a session.

        Raises: InputError where pyspark is not there, or no session can be had.
        """
        try:
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise InputError(
                f"--engine spark needs a package that is missing: {error}",
                fix="pip install 'mosaicjax[spark]'",
            ) from error
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        try:
            builder = SparkSession.builder.appName("mosaicjax data build")
            brought = any(os.environ.get(name) for name in MASTER_BROUGHT)
            if not brought and SparkSession.getActiveSession() is None:
                builder = builder.master(f"local[{workers}]").config("spark.ui.enabled", "false")
                builder = builder.config("spark.ui.showConsoleProgress", "false")
                # Tasks import what this process does.
                paths = os.pathsep.join(filter(None, sys.path))
                builder = builder.config("spark.executorEnv.PYTHONPATH", paths)
            self._session = builder.getOrCreate()
            self._at_once = 4 * self._session.sparkContext.defaultParallelism
        except Exception as error:
            # Java tells of what is missing in many ways, and none of them is a class of its own.
            said = storage.one_line(error)
            raise InputError("no Spark session can be had", got=said, fix="Java 17 or later") from error

    def run(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], most: int | None = None
    ) -> Iterator[tuple[Task, Result]]:
        """See `Engine.run`.

        Raises: InputError of a task, or where one failed in another way, after the retries of the cluster.
        """
        from pyspark.errors import PySparkException

        given = list(tasks)
        for first in range(0, len(given), self._at_once):
            some = given[first : first + self._at_once]
            rows = [(number, pickle.dumps((function, task))) for number, task in enumerate(some)]
            frame = self._session.createDataFrame(rows, "number long, task binary")
            # Partitions of a range are one task each, which those of a hash are not.
            spread = frame.repartitionByRange(len(some), "number")
            try:
                found = spread.mapInArrow(answers, SCHEMA).collect()
            except PySparkException as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise InputError(
                    "a Spark task failed",
                    got=lines[-1].strip() if lines else type(error).__name__,
                    fix="the same command goes on where it stopped",
                ) from error
            for row in found:
                failure, result = pickle.loads(row["answer"])
                if failure is not None:
                    raise failure
                yield some[row["number"]], result


def answers(batches: Iterable[Any]) -> Iterator[Any]:
    """Do the tasks of Arrow batches: a refusal is an answer, for a task said again would say the same."""
    import pyarrow

    for batch in batches:
        for number, pickled in zip(batch["number"].to_pylist(), batch["task"].to_pylist(), strict=True):
            function, task = pickle.loads(pickled)
            try:
                answer: tuple[Exception | None, Any] = (None, function(task))
            except (InputError, OSError) as error:
                answer = (error, None)
            yield pyarrow.RecordBatch.from_pydict(
                {"number": pyarrow.array([number], pyarrow.int64()), "answer": [pickle.dumps(answer)]}
            )
