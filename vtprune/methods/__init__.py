"""The methods: one file each. A key of `METHODS` is a name `wrap` takes; its value builds the `Pipeline`."""

from __future__ import annotations

from collections.abc import Callable

from vtprune.methods.adaptinfer import adaptinfer
from vtprune.methods.atp import atp
from vtprune.methods.attention_sink import attention_sink
from vtprune.methods.blindsight import blindsight
from vtprune.methods.cdpruner import cdpruner
from vtprune.methods.dart import dart
from vtprune.methods.divprune import divprune
from vtprune.methods.dyvte import dyvte
from vtprune.methods.fastervlm import fastervlm
from vtprune.methods.fastv import fastv
from vtprune.methods.flowcut import flowcut
from vtprune.methods.fopru import fopru_rank, fopru_row
from vtprune.methods.hiprune import hiprune
from vtprune.methods.holov import holov
from vtprune.methods.identity import identity
from vtprune.methods.idpruner import idpruner
from vtprune.methods.information_horizon import information_horizon
from vtprune.methods.look_m import look_m
from vtprune.methods.mustdrop import mustdrop
from vtprune.methods.mustdrop_vision import mustdrop_vision
from vtprune.methods.pool import pool
from vtprune.methods.prumerge_plus import prumerge_plus
from vtprune.methods.prunesid import prunesid
from vtprune.methods.pyramiddrop import pyramiddrop
from vtprune.methods.quota import quota
from vtprune.methods.random import random
from vtprune.methods.scope import scope
from vtprune.methods.sparsevlm import sparsevlm
from vtprune.methods.sparsevlm_plus import sparsevlm_plus
from vtprune.methods.temporal import temporal
from vtprune.methods.text_dominance import text_dominance
from vtprune.methods.todre import todre
from vtprune.methods.todre_select import todre_select
from vtprune.methods.tome import tome
from vtprune.methods.transprune import transprune
from vtprune.methods.uniform import uniform
from vtprune.methods.vflowopt import vflowopt
from vtprune.methods.vflowopt_select import vflowopt_select
from vtprune.methods.visionzip import visionzip
from vtprune.methods.vispruner import vispruner
from vtprune.methods.vtc_cls import vtc_cls
from vtprune.methods.vtprune import vtprune
from vtprune.methods.zero_tprune import zero_tprune
from vtprune.methods.zipvl import zipvl
from vtprune.methods.zoo_prune import zoo_prune
from vtprune.pipeline import Pipeline

METHODS: dict[str, Callable[..., Pipeline]] = {
    "vtprune": vtprune,
    "fastervlm": fastervlm,
    "vtc_cls": vtc_cls,
    "fopru_rank": fopru_rank,
    "fopru_row": fopru_row,
    "text_dominance": text_dominance,
    "hiprune": hiprune,
    "holov": holov,
    "divprune": divprune,
    "todre_select": todre_select,
    "idpruner": idpruner,
    "vispruner": vispruner,
    "scope": scope,
    "cdpruner": cdpruner,
    "zoo_prune": zoo_prune,
    "prunesid": prunesid,
    "dart": dart,
    "visionzip": visionzip,
    "vflowopt_select": vflowopt_select,
    "prumerge_plus": prumerge_plus,
    "tome": tome,
    "flowcut": flowcut,
    "mustdrop_vision": mustdrop_vision,
    "zero_tprune": zero_tprune,
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "sparsevlm": sparsevlm,
    "sparsevlm_plus": sparsevlm_plus,
    "adaptinfer": adaptinfer,
    "atp": atp,
    "transprune": transprune,
    "information_horizon": information_horizon,
    "vflowopt": vflowopt,
    "mustdrop": mustdrop,
    "todre": todre,
    "dyvte": dyvte,
    "zipvl": zipvl,
    "look_m": look_m,
    "attention_sink": attention_sink,
    "blindsight": blindsight,
    "quota": quota,
    "temporal": temporal,
    "pool": pool,
    "random": random,
    "uniform": uniform,
    "identity": identity,
}
