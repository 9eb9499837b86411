import pytest

from tests.serve import served


@pytest.fixture(scope="session")
def model():
    return served.Model()


@pytest.fixture(scope="session")
def generator(model):
    return model.generator()


@pytest.fixture(scope="session")
def free_engine(model):
    """For tests that start a server of their own."""
    return model.engine()


@pytest.fixture(scope="session")
def own_engine(model):
    """For tests that drive it by hand."""
    return model.engine()


@pytest.fixture(scope="package")
def server(model):
    """One for all tests that ask it nothing it may not be asked."""
    with served.running(model.engine()) as made:
        yield made


@pytest.fixture(scope="package")
def client(server):
    with server.client() as made:
        yield made
