"""What torch rounds the operands of float32 products to on a GPU: ``tf32``, or another of its words for a precision."""

from __future__ import annotations

import torch


def of_matrix_products() -> str:
    matmul = torch.backends.cuda.matmul
    # torch 2.9 has a switch for each kind of product; where it was used, reading the older switches is an error.
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision
    return "tf32" if matmul.allow_tf32 else "ieee"


def of_convolutions() -> str:
    if hasattr(torch.backends.cudnn, "conv"):
        return torch.backends.cudnn.conv.fp32_precision
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
