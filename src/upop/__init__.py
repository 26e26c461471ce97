"""UPop for vision transformers: prune a ViT by one unified, progressive search, and save a smaller, faster one."""

from upop.analysis import Analysis, analyze
from upop.errors import UpopError
from upop.pretrained import from_pretrained, register, save_pretrained
from upop.search import Search, Target
from upop.slim import slim

__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "Search",
    "Target",
    "UpopError",
    "analyze",
    "from_pretrained",
    "save_pretrained",
    "slim",
]

register()
