//! Bulk and tensor copies, and the building of tensor maps in memory.

use super::Result;
use super::body::Body;
use super::memory::place;
use crate::program::*;
use crate::ptx::ast::{Operand, Ty};
use crate::tensor_map;

const NOWHERE: Addr = Addr { reg: NONE, wide: true, offset: 0 };

impl Body<'_, '_> {
    pub(super) fn tensor(&mut self) -> Result<bool> {
        if self.instr.opcode != "tensormap" {
            return Ok(false);
        }
        self.class = Class::Async;
        if self.mods.take("cp_fenceproxy") {
            self.mods.any(&[
                "global",
                "shared::cta",
                "tensormap::generic",
                "proxy",
                "release",
                "acquire",
                "gpu",
                "sys",
                "cta",
                "sync",
                "aligned",
            ]);
            let rest: Vec<String> = self
                .mods
                .rest()
                .iter()
                .filter(|m| m.starts_with("tensormap::") || m.starts_with("proxy"))
                .map(|m| (*m).to_owned())
                .collect();
            for m in rest {
                self.mods.take(&m);
            }
            self.arity(3, 3)?;
            let (d, s) = (self.operand(0)?, self.operand(1)?);
            let (dst, src) = (self.address(d)?, self.address(s)?);
            self.emit(Inst { kind: Kind::MapCopy { dst, src }, ..self.blank() })?;
            return Ok(true);
        }
        if !self.mods.take("replace") {
            return Ok(false);
        }
        self.mods.take("tile");
        let field = self.mods.find(|m| {
            Some(match m {
                "global_address" => (tensor_map::ADDRESS, 8, 0),
                "rank" => (tensor_map::RANK, 1, 0),
                "box_dim" => (tensor_map::BOXES, 4, 4),
                "global_dim" => (tensor_map::DIMS, 4, 4),
                "global_stride" => (tensor_map::STRIDES, 8, 8),
                "element_stride" => (tensor_map::STEPS, 4, 4),
                "elemtype" => (tensor_map::TYPE, 1, 0),
                "interleave_layout" => (tensor_map::INTERLEAVE, 1, 0),
                "swizzle_mode" => (tensor_map::SWIZZLE, 1, 0),
                "fill_mode" => (tensor_map::FILL, 1, 0),
                _ => return None,
            })
        });
        let Some((field, bytes, step)) = field else {
            return Ok(false);
        };
        let place = self.mods.find(place).unwrap_or(Place::Generic);
        self.mods.take("b1024");
        let Some(ty) = self.mods.ty() else {
            return Ok(false);
        };
        let n = if step > 0 { 3 } else { 2 };
        self.arity(n, n)?;
        let o = self.operand(0)?;
        let address = self.address(o)?;
        let mut at = field;
        if step > 0 {
            match self.operand(1)? {
                Operand::Int(i @ 0..=4) if step == 4 || *i < 4 => at += step * *i as usize,
                _ => return self.fail("the index of the dimension must be a small number"),
            }
        }
        let mut a = self.src_any(n - 1, ty)?;
        // The swizzle numbers of PTX: 0 none, 1 32, 2 64, 3 128 bytes, the same as in the driver's enumeration.
        if bytes == 8 && a.words == 1 {
            let t = self.temp(2)?;
            self.part(crate::lanes::op1(|a: u32| u64::from(a)), t, a.at)?;
            a.at = t;
        }
        let kind = Kind::MapReplace { address, place, field: at as u32, bytes };
        self.emit(Inst { a: a.at, kind, ..self.blank() })?;
        Ok(true)
    }

    /// `cp.async.bulk...` and `cp.reduce.async.bulk...` after these words.
    pub(super) fn bulk(&mut self, reduce: bool) -> Result<bool> {
        if self.mods.take("commit_group") {
            self.emit(Inst { kind: Kind::BulkCommit, ..self.blank() })?;
            return Ok(true);
        }
        if self.mods.take("wait_group") {
            self.mods.take("read");
            return match self.operand(0)? {
                Operand::Int(n @ 0..=0xffff) => {
                    self.emit(Inst { kind: Kind::BulkWait(*n as u32), ..self.blank() })?;
                    Ok(true)
                }
                _ => self.fail("expected the number of groups"),
            };
        }
        let prefetch = self.mods.take("prefetch");
        let tensor = self.mods.take("tensor");
        let dims = self.mods.find(|m| ["1d", "2d", "3d", "4d", "5d"].iter().position(|d| *d == m).map(|i| i + 1));
        self.mods.take("tile");
        let multicast = self.mods.take("multicast::cluster");
        let mbar = self.mods.take("mbarrier::complete_tx::bytes");
        let group = self.mods.take("bulk_group");
        let hint = self.mods.take("L2::cache_hint");
        if prefetch {
            self.mods.any(&["L2", "global"]);
            self.emit(Inst { kind: Kind::Nop, ..self.blank() })?;
            return Ok(true);
        }
        let op = self.mods.find(|m| {
            Some(match m {
                "add" => AtomOp::Add,
                "min" => AtomOp::Min,
                "max" => AtomOp::Max,
                "inc" => AtomOp::Inc,
                "dec" => AtomOp::Dec,
                "and" => AtomOp::And,
                "or" => AtomOp::Or,
                "xor" => AtomOp::Xor,
                _ => return None,
            })
        });
        if op.is_some() != reduce {
            return self.fail("a reduction needs an operation");
        }
        self.mods.take("noftz");
        let (Some(to), Some(from)) = (self.mods.find(place), self.mods.find(place)) else {
            return Ok(false);
        };
        let reduce_ty = self.mods.ty();
        let to_shared = to == Place::Shared;
        let both = to_shared && from == Place::Shared;
        if mbar == group || (to_shared && !mbar) {
            return self.fail("this way of completion is not supported");
        }
        let mut b = Bulk {
            to_shared,
            shared: NOWHERE,
            global: NOWHERE,
            size: NONE,
            coords: Vec::new(),
            tensor,
            mbar: None,
            reduce: None,
            shared_both: both,
        };
        let map = |o: &'_ Operand| match o {
            Operand::Address { base, offset, more } if more.len() == 1 => {
                Some((base.clone(), *offset, more[0].clone()))
            }
            _ => None,
        };
        let (first, second) = (self.operand(0)?, self.operand(1)?);
        if tensor {
            let (shared, tensor) = if to_shared { (first, second) } else { (second, first) };
            let (Some((base, offset, coords)), Some(dims)) = (map(tensor), dims) else {
                return self.fail("expected `[map, {coordinates}]`");
            };
            b.shared = self.address(shared)?;
            b.global = self.base(&base, offset)?;
            let coords = match coords {
                Operand::Vector(v) => v,
                o => vec![o],
            };
            if coords.len() != dims {
                return self.fail("the number of coordinates does not fit");
            }
            for c in &coords {
                let at = self.value(c, Ty::S32)?;
                b.coords.push(at);
            }
            if let Some(op) = op {
                // The element type comes from the map.
                b.reduce = Some((op, AtomTy::Unsigned, 0));
            }
        } else {
            self.arity(3, 6)?;
            b.shared = self.address(if to_shared { first } else { second })?;
            b.global = self.address(if to_shared { second } else { first })?;
            b.size = self.src(2, Ty::U32)?;
            if let Some(op) = op {
                let (ty, bytes) = match reduce_ty {
                    Some(Ty::F16) => (AtomTy::F16, 2),
                    Some(Ty::Bf16) => (AtomTy::Bf16, 2),
                    Some(Ty::F32) => (AtomTy::F32, 4),
                    Some(Ty::F64) => (AtomTy::F64, 8),
                    Some(Ty::S32) => (AtomTy::Signed, 4),
                    Some(Ty::S64) => (AtomTy::Signed, 8),
                    Some(Ty::U32 | Ty::B32) => (AtomTy::Unsigned, 4),
                    Some(Ty::U64 | Ty::B64) => (AtomTy::Unsigned, 8),
                    _ => return self.fail("this type of reduction is not supported"),
                };
                b.reduce = Some((op, ty, bytes));
            }
        }
        let mut used = if tensor { 2 } else { 3 };
        if mbar {
            let o = self.operand(used)?;
            b.mbar = Some(self.address(o)?);
            used += 1;
        }
        // The mask of a multicast and a cache policy change nothing in a cluster of one.
        used += usize::from(multicast) + usize::from(hint);
        if self.count() != used {
            return self.fail("the number of operands does not fit");
        }
        self.emit(Inst { kind: Kind::Bulk(Box::new(b)), ..self.blank() })?;
        Ok(true)
    }
}
