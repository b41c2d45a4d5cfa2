"""Checks of a job's JSON before the dry run starts."""

from __future__ import annotations

from lomo_ds.config import from_mapping
from lomo_ds.optimizers import optimizer_from_json
from lomo_ds.planner.job import Job
from lomo_ds.planner.model_kind import refuse_unplannable_class
from lomo_ds.zero3.deepspeed_check import refuse_unreadable
from lomo_ds.zero3.supported import check_secondary_partitions, refuse_unsupported
from lomo_ds.zero3.vocabulary.tiled_functions import KEY as TILING_KEY
from lomo_ds.zero3.vocabulary.tiled_functions import TiledVocabularyConfig


def refuse_unplannable(job: Job) -> None:
    """Refuse a class of models, or a JSON, that the dry run's engine would refuse. Imports DeepSpeed.

    Raises:
        ValueError: the engine or DeepSpeed refuses a value; names its key.
    """
    refuse_unplannable_class(job.model_class, job.model)
    ds_json = job.engine_ds_json()
    from_mapping(TiledVocabularyConfig, ds_json.get("tiled_vocabulary", {}), TILING_KEY)
    if job.is_own:
        refuse_unsupported(ds_json)
        check_secondary_partitions(ds_json, job.num_gpus)
        optimizer_from_json(ds_json["optimizer"])
    refuse_unreadable(ds_json)
