"""The tasks, by name: functions that load one."""

from benchmarks.quality.tasks import dense
from benchmarks.quality.tasks import language
from benchmarks.quality.tasks import masked
from benchmarks.quality.tasks import smollm2
from benchmarks.quality.tasks import teachers
from benchmarks.quality.tasks import texts
from benchmarks.quality.tasks import vit

TASKS = (
    dense.TASKS
    | vit.TASKS
    | texts.TASKS
    | masked.TASKS
    | language.TASKS
    | smollm2.TASKS
    | teachers.TASKS
)
