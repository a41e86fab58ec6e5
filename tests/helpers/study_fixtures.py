"""A tiny study, done once without a disturbance."""

import pytest


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    from helpers.units import make_sources

    return make_sources(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def units(sources):
    from helpers.units import make_units

    return make_units(sources)


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run):
    """The store of the study, done to its end."""
    return undisturbed_run[0]


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory, sources, units):
    """The store, and the jobs in the order in which they were done."""
    from helpers.units import InThisProcess

    from sparselet.studies.engine.run import run_study
    from sparselet.studies.engine.store import Store
    from sparselet.studies.engine.unit import closure

    store = Store(tmp_path_factory.mktemp("undisturbed"))
    planned = closure(units)
    executor = InThisProcess(store, sources, lambda job: [store.result(planned[key]) or pytest.fail(key) for key in job.needs])
    progress = run_study(units, store, executor)
    assert not progress.failed
    assert progress.done == set(progress.units)
    return store, executor.jobs
