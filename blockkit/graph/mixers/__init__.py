"""The operations that look at other tokens, each with its own forward: attention, convolutions, scans and others."""

from .convolution import CausalConvolution
from .pooling import AveragePool
from .retention import Retain
from .scan import DualScan, SelectiveScan
from .token_mlp import TokenMLP
from .wkv import WKV, TokenShift

__all__ = ["WKV", "AveragePool", "CausalConvolution", "DualScan", "Retain", "SelectiveScan", "TokenMLP", "TokenShift"]
