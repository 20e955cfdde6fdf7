"""Each internal of a library that tame relies on is there, and takes what tame gives it. A failure names it and who needs it.

Whoever raises an upper bound in pyproject.toml runs this first: what has changed is named here, instead of somewhere deep in a
run. `takes` holds the parameters that tame gives; `is_all` says that there are no others, because tame overrides the method or
gives them by position.
"""

import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent


class Internal(NamedTuple):
    """A name inside a library, who relies on it, and the parameters that it has to take; None: it is no function."""

    name: str
    needed_by: str
    takes: tuple[str, ...] | None = None
    is_all: bool = False


TRANSFORMERS, PREFECT, HARNESS = (
    "tasks/transformers_adapter.py",
    "infra/patched_worker.py",
    "tasks/evaluate/lm_eval_adapter.py",
)
MLFLOW, SERVER, FOUR_BIT = "tasks/track/mlflow_internals.py", "flows/temporary_server.py", "tasks/quantize/methods"
MODEL = "transformers.modeling_utils:PreTrainedModel"
LOADING = "transformers.core_model_loading"
INTERNALS = (
    Internal(f"{MODEL}.get_init_context", TRANSFORMERS, ("dtype", "is_quantized", "_is_ds_init_called", "allow_all_kernels"), True),
    Internal(f"{MODEL}._get_dtype_plan", TRANSFORMERS, ("dtype",), True),
    Internal(f"{MODEL}.tie_weights", TRANSFORMERS, ("missing_keys", "recompute_mapping"), True),
    Internal(f"{MODEL}._keys_to_ignore_on_load_missing", TRANSFORMERS),
    Internal(f"{MODEL}._keys_to_ignore_on_save", TRANSFORMERS),
    Internal("transformers.modeling_utils:remove_tied_weights_from_state_dict", TRANSFORMERS, ("state_dict", "model"), True),
    Internal(f"{LOADING}:dot_natural_key", TRANSFORMERS, ("s",), True),
    Internal(
        f"{LOADING}:rename_source_key",
        TRANSFORMERS,
        ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"),
    ),
    Internal(f"{LOADING}:revert_weight_conversion", TRANSFORMERS, ("model", "state_dict"), True),
    Internal(f"{LOADING}:WeightConverter", TRANSFORMERS, ("source_patterns", "target_patterns")),
    Internal(f"{LOADING}:WeightRenaming.was_used", TRANSFORMERS, (), True),
    Internal(
        "transformers.conversion_mapping:get_model_conversion_mapping", TRANSFORMERS, ("model", "key_mapping", "hf_quantizer")
    ),
    Internal("transformers.quantizers.base:get_keys_to_not_convert", TRANSFORMERS, ("model",), True),
    Internal("transformers.quantizers.quantizers_utils:should_convert_module", TRANSFORMERS, ("full_name", "patterns"), True),
    Internal("transformers.quantizers:AutoHfQuantizer.from_config", TRANSFORMERS, ("quantization_config",)),
    Internal("transformers.quantizers.base:HfQuantizer.preprocess_model", TRANSFORMERS, ("model", "dtype")),
    Internal("transformers.quantizers.base:HfQuantizer.param_needs_quantization", TRANSFORMERS, ("model", "param_name")),
    Internal("transformers.pytorch_utils:Conv1D", TRANSFORMERS),
    Internal("transformers:AutoModelForCausalLM._model_mapping", TRANSFORMERS),
    Internal(
        "transformers.dynamic_module_utils:get_class_from_dynamic_module",
        TRANSFORMERS,
        ("class_reference", "pretrained_model_name_or_path"),
    ),
    Internal("prefect.workers.base:BaseWorker.get_and_submit_flow_runs", PREFECT, (), True),
    Internal("prefect.workers.process:ProcessJobConfiguration.prepare_for_flow_run", PREFECT, ("flow_run",)),
    Internal("prefect.utilities.processutils:command_to_string", PREFECT, ("command",), True),
    Internal("prefect.utilities.processutils:get_sys_executable", PREFECT, (), True),
    Internal("prefect.cli:app", PREFECT),
    Internal("prefect.engine", PREFECT),
    Internal("prefect.utilities.callables:parameter_schema", "infra/provision.py", ("fn",), True),
    Internal("prefect.server.concurrency.lease_storage.filesystem:ConcurrencyLeaseStorage", "infra/up.py"),
    Internal("prefect.server.api.server:create_app", SERVER),
    Internal("prefect.logging.handlers:APILogWorker.drain_all", "flows/local.py", ("timeout",)),
    Internal("prefect:Task.__init__", "tasks/fleet/flow_runs.py", ("fn", "name")),
    Internal(
        "prefect.client.orchestration:SyncPrefectClient.create_task_run",
        "tasks/fleet/flow_runs.py",
        ("task", "flow_run_id", "dynamic_key", "name", "state"),
    ),
    Internal("prefect.utilities.urls:url_for", "tasks/fleet/flow_runs.py", ("obj", "obj_id")),
    Internal("lm_eval.tasks:TaskManager.__init__", HARNESS, ("include_path", "include_defaults")),
    Internal("lm_eval.tasks:TaskManager.load", HARNESS, ("task_list",), True),
    Internal("lm_eval.tasks:TaskManager.task_index", HARNESS),
    Internal("lm_eval.utils:env.from_string", HARNESS, ("source",)),
    Internal("lm_eval:evaluate", HARNESS, ("lm", "task_dict", "limit", "bootstrap_iters", "log_samples")),
    Internal("lm_eval.models.huggingface:HFLM.tok_encode", HARNESS, ("string", "add_special_tokens", "left_truncate_len"), True),
    Internal("lm_eval.models.huggingface:HFLM.loglikelihood", HARNESS, ("requests", "disable_tqdm"), True),
    Internal("lm_eval.models.huggingface:HFLM._encode_pair", HARNESS, ("context", "continuation"), True),
    Internal(
        "lm_eval.models.huggingface:HFLM._loglikelihood_tokens", HARNESS, ("requests", "disable_tqdm", "override_bs"), True
    ),
    Internal("lm_eval.models.huggingface:HFLM.__init__", HARNESS, ("pretrained", "tokenizer", "batch_size", "device")),
    Internal("lm_eval.api.task:ConfigurableTask.set_fewshot_seed", HARNESS, ("seed",)),
    Internal("lm_eval.api.task:ConfigurableTask.set_config", HARNESS, ("key", "value")),
    Internal("lm_eval.api.task:ConfigurableTask.get_config", HARNESS, ("key",)),
    Internal("mlflow.tracking._tracking_service.utils:_tracking_uri", MLFLOW),
    Internal("mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore.__init__", MLFLOW, ("db_uri", "default_artifact_root")),
    Internal("mlflow.store.db.utils:_get_alembic_config", MLFLOW, ("db_url",)),
    Internal("mlflow.server:BACKEND_STORE_URI_ENV_VAR", MLFLOW),
    Internal("mlflow.server:ARTIFACT_ROOT_ENV_VAR", MLFLOW),
    Internal("mlflow.server:_UVICORN_LOG_CONFIG", MLFLOW),
    Internal("mlflow.environment_variables:_MLFLOW_SERVER_BOOT_ID", MLFLOW),
    Internal("mlflow.environment_variables:_MLFLOW_SGI_NAME", MLFLOW),
    Internal("mlflow.server.fastapi_app:app", MLFLOW),
    Internal("mlflow.store.db.utils:_upgrade_db", MLFLOW, ("engine",), True),
    Internal(
        "mlflow.system_metrics.system_metrics_monitor:SystemMetricsMonitor.__init__",
        MLFLOW,
        ("run_id", "sampling_interval", "resume_logging", "tracking_uri"),
    ),
    Internal("mlflow.models.utils:get_external_mlflow_model_spec", MLFLOW, ("logged_model",), True),
    Internal("mlflow.models.model:MLMODEL_FILE_NAME", MLFLOW),
    Internal("mlflow.utils.mlflow_tags:MLFLOW_MODEL_IS_EXTERNAL", MLFLOW),
    Internal("huggingface_hub.file_download:repo_folder_name", "tasks/download/hub.py", ("repo_id", "repo_type"), True),
    Internal(
        "huggingface_hub.file_download:http_get", "tasks/publish/transfer.py", ("url", "temp_file", "headers", "expected_size")
    ),
    Internal("huggingface_hub:CommitOperationAdd.as_file", "tasks/publish/transfer.py", ("with_tqdm",), True),
    Internal("huggingface_hub.utils:build_hf_headers", "tasks/publish", ("token",)),
    Internal("huggingface_hub.utils:parse_ratelimit_headers", "tasks/publish/client.py", ("headers",), True),
    Internal("bitsandbytes.functional:QuantState.as_dict", FOUR_BIT, ("packed",), True),
    Internal("bitsandbytes.functional:QuantState.from_dict", FOUR_BIT, ("qs_dict", "device"), True),
    Internal("bitsandbytes.functional:get_4bit_type", FOUR_BIT, ("typename", "device", "blocksize"), True),
    Internal("bitsandbytes.functional:quantize_blockwise", FOUR_BIT, ("A", "blocksize")),
    Internal("bitsandbytes.functional:int8_vectorwise_quant", FOUR_BIT, ("A",)),
)  # fmt: skip


@pytest.mark.parametrize("internal", INTERNALS, ids=[internal.name for internal in INTERNALS])
def test_an_internal_is_there_and_takes_what_it_is_given(internal: Internal) -> None:
    module, _, path = internal.name.partition(":")
    needed = f"{internal.name}, which {internal.needed_by} relies on"
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        pytest.fail(f"{needed}, is not there: {error}")
    for part in filter(None, path.split(".")):
        if not hasattr(found, part):
            pytest.fail(f"{needed}, is not there")
        found = getattr(found, part)
    if internal.takes is None:
        return
    parameters = inspect.signature(found).parameters
    names = [
        name
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name != "self"
    ]
    if internal.is_all:
        assert tuple(names) == internal.takes, f"{needed}, takes other parameters now"
    else:
        missing = set(internal.takes) - set(names)
        assert not missing, f"{needed}, does not take {', '.join(sorted(missing))} any more"


def _declared() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = [*project["dependencies"], *(one for some in project["optional-dependencies"].values() for one in some)]
    split = [re.match(r"([\w.-]+)(?:\[[^]]*\])?(.*)", one) for one in every]
    return {_plain(found[1]): found[2] for found in split if found}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _imported() -> Iterator[tuple[str, str]]:
    """Every top-level name that a file of the product imports or starts by `-m`, and the file."""
    files = [
        ROOT / "tame.py",
        *(path for part in ("configs", "flows", "infra", "tasks") for path in (ROOT / part).rglob("*.py")),
    ]
    for path in files:
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(r'^\s*(?:from ([\w]+)[\w.]* import|import (\w+))|"-m", "(\w+)', text, re.MULTILINE):
            yield str(path.relative_to(ROOT)), next(filter(None, found.groups()))


def test_every_library_that_is_imported_is_declared() -> None:
    ours = {"configs", "flows", "infra", "tasks", "tame"}
    declared, distributions = set(_declared()), packages_distributions()
    missing = {
        f"{name} ({file})"
        for file, name in _imported()
        if name not in sys.stdlib_module_names and name not in ours
        and name in distributions and not declared & set(map(_plain, distributions[name]))
    }  # fmt: skip
    assert sorted(missing) == []


@pytest.mark.parametrize("name", ["transformers", "prefect", "mlflow", "lm-eval", "bitsandbytes", "huggingface-hub"])
def test_a_library_whose_internals_are_relied_on_has_an_upper_bound(name: str) -> None:
    assert "<" in _declared()[name], f"pyproject.toml: {name} needs an upper bound at the minor version that was tested"
