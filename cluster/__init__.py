"""Tasks on threads, processes and Dask: the same results, however many machines do them.

    ScaleOutParams   where tasks run
    Crew             workers for one kind of work: call it with tasks, as often as there are some
    map_tasks        every task once, results as they come;  map_in_order: in the tasks' order

This room knows no store, no model and no picture, and is the only one that imports dask.
"""

from cluster.crew import Crew, ScaleOutParams, SchedulerName, crew_for, map_in_order, map_tasks
from gill_errors import TasksLostError, UnfitWorkerError
