"""Models of other frameworks: read from and written to directories in Hugging Face's format."""

from mosaicjax.hub.export_model import export_adapter, export_model
from mosaicjax.hub.import_model import import_model
from mosaicjax.hub.model_dir import model_of

__all__ = ["export_adapter", "export_model", "import_model", "model_of"]
