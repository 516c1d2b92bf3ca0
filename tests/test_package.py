"""The architecture: which module may import which, what is public, and a light import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlxterp
import mlxterp.sae

ROOT = Path(mlxterp.__file__).parent.parent
# A module may import modules of earlier lines and, without a circle, of its own line.
ORDER = """
backend version notebook texts
sites interventions tokenization hooks probing norms dataflow places architecture loading
sae.kernels sae.activation_functions sae.files sae.gpu_sources sae.gpu_kernels sae.interrupts
tracing editing attention constants freezing trace generation
sae.config sae.token_norms sae.coder sae.run_state sae.memory sae.demand
sae.processes sae.parallel
sae.losses sae.optimizer
sae.schedules sae.dead_features sae.objective
sae.initialization
sae.step
sae.source sae.forward_order sae.model_pair sae.documents sae.dataset_info sae.shards sae.shuffle
sae.corpus sae.harvest sae.cleaning sae.diversity sae.curation
sae.store sae.caching sae.serving sae.dataset
sae.features sae.similarity sae.steering sae.labels
sae.visualization.fonts sae.visualization.style sae.visualization.training
sae.visualization.matrices sae.visualization.measures
sae.visualization.lenses
sae.visualization
sae.callbacks sae.metadata sae.compatibility sae.steering.places sae.steering.edits
sae.evals sae.evals.noise sae.evals.sums sae.evals.definitions
sae.evals.fidelity sae.evals.replacing sae.evals.loss
sae.evals.sparsity sae.evals.controls sae.evals.reconstruction sae.evals.measuring
sae.evals.model_loss sae.evals.loss_passes
sae.features.display sae.features.examples sae.features.codes sae.features.co_occurrence
sae.features.data sae.features.card
sae.features.collection sae.features.logit_effects sae.features.attribution sae.features.peaks
sae.features.analysis sae.features.interpretation sae.features.search
sae.features.connections
sae.similarity.directions sae.similarity.nearest sae.similarity.matching sae.similarity.stability
sae.similarity.clusters sae.similarity.map
sae.steering.report sae.steering.sweep
sae.labels.prompts sae.labels.contexts sae.labels.scores sae.labels.labels
sae.labels.token_tables sae.labels.token_labels
sae.labels.labelers sae.labels.server sae.labels.questions sae.labels.labeling
sae.features.view
sae.sharing sae.interactions sae.latent_scaling sae.diffing
sae.run sae.loggers
sae.trainer
sae.formats sae.formats.archives sae.formats.torch_objects sae.formats.pickles
sae.formats.tensors sae.formats.names sae.formats.parts sae.formats.single
sae.formats.saelens_writing sae.formats.saelens sae.formats.sparsify
sae.formats.torch_writing sae.formats.dictionary_learning_writing sae.formats.dictionary_learning
sae.formats.gemma_scope_cross_layer sae.formats.gemma_scope
sae.formats.llama_scope sae.formats.openai sae.formats.qwen_scope sae.formats.goodfire
sae.formats.hook_z
sae.formats.circuit_tracer_files sae.formats.circuit_tracer_cross_layer
sae.formats.circuit_tracer sae.formats.llamascopium
sae.formats.neuronpedia sae.formats.neuronpedia_labels
sae.formats.reading sae.formats.writing
sae.evals.origin sae.evals.schemas sae.evals.report sae.evals.evaluating
sae.evals.tasks sae.evals.tasks.logistic sae.evals.tasks.splits sae.evals.tasks.result
sae.evals.tasks.labelled sae.evals.tasks.builtin_sets sae.evals.tasks.random_coder
sae.evals.tasks.words sae.evals.tasks.probing sae.evals.tasks.absorption
sae.evals.tasks.perturbation sae.evals.tasks.synthetic sae.evals.tasks.ground_truth
sae.evals.tasks.stability sae.evals.tasks.autointerp sae.evals.tasks.saebench
sae.evals.tasks.benchmarks
sae.bound sae.evals.comparing
sae.dashboard sae.dashboard.strings sae.dashboard.passages sae.dashboard.layout sae.dashboard.sides
sae.dashboard.bundle sae.dashboard.reading sae.dashboard.facts sae.dashboard.build
sae.dashboard.asked sae.dashboard.guard
sae.dashboard.calling sae.dashboard.live sae.dashboard.pages sae.dashboard.server
sae.dashboard.running sae.dashboard.dashboard
sae.methods
sae.hub_card sae.hub_errors sae.hub_files
sae.hub
sae.base
sae.fitting
sae.sae sae.transcoder sae.crosscoder sae.cross_layer
sae.checkpoint
sae.testbeds.handmade sae.testbeds.repetition
sae.testbeds.planted sae.testbeds.induction sae.testbeds.trained
sae.testbeds
sae.circuits
sae.circuits.nodes sae.circuits.layout sae.circuits.summary sae.circuits.storage
sae.circuits.validation sae.circuits.drawing sae.circuits.page sae.circuits.circuit
sae.circuits.given sae.circuits.cost sae.circuits.derivatives
sae.circuits.dataset sae.circuits.dataset.pathway sae.circuits.dataset.effects
sae.circuits.dataset.between
sae.circuits.behavior sae.circuits.behavior.targets sae.circuits.behavior.ablation
sae.circuits.behavior.flows sae.circuits.behavior.edges sae.circuits.behavior.restoration
sae.circuits.behavior.faithfulness sae.circuits.behavior.behavior
sae.circuits.graph sae.circuits.graph.held sae.circuits.graph.replacement
sae.circuits.attention sae.circuits.attention.score_pairs sae.circuits.attention.score_sources
sae.circuits.attention.score_changes sae.circuits.attention.qk_attribution
sae.circuits.attention.heads
sae.circuits.graph.influence sae.circuits.graph.readouts sae.circuits.graph.checks
sae.circuits.graph.attribution_graph sae.circuits.graph.search
sae.circuits.graph.feature_export sae.circuits.graph.export sae.circuits.graph.reading
sae
analysis.source analysis.activations analysis.predictions
analysis.heads analysis.metrics
analysis.readout analysis.lens analysis.logit_lens analysis.tuned_lens analysis.lens_training
analysis.logit_parts analysis.logit_attribution
analysis.patches analysis.grid analysis.patching_result
analysis.patching analysis.attribution_patching analysis.paths analysis.path_patching
analysis.causal_tracing
analysis.site_rows analysis.contrasts analysis.steering_vectors
analysis.probe_fits analysis.probe_data analysis.probes analysis.probe_layers
analysis.hook_names analysis.hook_cache analysis.familiar
analysis.methods analysis
visualization.patterns visualization.scores visualization.sampling
visualization.heads visualization.interactive
visualization.copying visualization.detection visualization.heatmaps
visualization
model
cli cli.settings
cli.commands
cli.main
__main__
"""
LINE = {
    f"mlxterp.{name}": i for i, line in enumerate(ORDER.split("\n")) for name in line.split()
} | {"mlxterp": len(ORDER)}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_name(path): path for path in ROOT.joinpath("mlxterp").rglob("*.py")}


def _imports(name: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in MODULES else node.module for member in members}
    return found & set(MODULES)


IMPORTS = {name: _imports(name) for name in MODULES}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    assert name in LINE, "a module without a place in the order of imports"
    backwards = [other for other in IMPORTS[name] if LINE[other] > LINE[name]]
    assert not backwards


def test_imports_form_no_circle():
    left = dict(IMPORTS)
    while done := {name for name, needs in left.items() if not needs & set(left)}:
        left = {name: needs for name, needs in left.items() if name not in done}
    assert not left


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_its_own_package(name):
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    assert package not in IMPORTS[name]


def test_sae_does_not_know_the_language_model():
    engine = {"model", "tracing", "trace", "architecture", "generation", "loading"}
    for name in MODULES:
        if name.startswith("mlxterp.sae"):
            assert not IMPORTS[name] & {f"mlxterp.{part}" for part in engine}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_is_too_long_to_read(name):
    assert len(MODULES[name].read_text().splitlines()) <= 400


@pytest.mark.parametrize("package", [mlxterp, mlxterp.sae, mlxterp.visualization])
def test_public_names_exist_and_are_sorted(package):
    assert package.__all__ == sorted(package.__all__)
    assert all(getattr(package, name, None) is not None for name in package.__all__)


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mlxterp.__version__)


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_the_import_is_light():
    heavy = [
        "mlx_lm", "transformers", "datasets", "matplotlib", "starlette", "jinja2", "wandb",
        "trackio", "tensorboard", "torch",
    ]  # fmt: skip
    code = f"import sys, mlxterp, mlxterp.sae; print([m for m in {heavy} if m in sys.modules])"
    done = _run(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_few_programs_need_is_imported_when_it_is_asked_for():
    rare = [
        "sae.circuits.circuit", "sae.dashboard.dashboard", "sae.evals.tasks.benchmarks",
        "sae.formats.reading", "sae.labels.labeling",
    ]  # fmt: skip
    code = f"import sys, mlxterp; print([m for m in {rare} if f'mlxterp.{{m}}' in sys.modules])"
    assert _run(code).stdout.strip() == "[]"
    assert {"Circuit", "find_feature_circuits"} <= set(dir(mlxterp.sae))
    assert mlxterp.sae.Circuit.__module__ == "mlxterp.sae.circuits.circuit"
    with pytest.raises(AttributeError, match="'mlxterp.sae' has no attribute 'Circus'"):
        mlxterp.sae.Circus


def test_the_base_api_is_at_the_top():
    assert mlxterp.interventions.compose is mlxterp.InterventionComposer
    assert mlxterp.scale is mlxterp.interventions.scale
    assert mlxterp.SAE is mlxterp.sae.SAE
