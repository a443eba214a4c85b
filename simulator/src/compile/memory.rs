//! Loads, stores, atomics, and the many ways to say "prefetch".

use super::Result;
use super::body::Body;
use crate::program::*;
use crate::ptx::ast::{Operand, Ty};

pub(super) fn place(m: &str) -> Option<Place> {
    Some(match m {
        "global" | "const" => Place::Global,
        "shared" | "shared::cta" | "shared::cluster" => Place::Shared,
        "local" => Place::Local,
        "param" | "param::entry" | "param::func" => Place::Param,
        _ => return None,
    })
}

fn class(p: Place) -> Class {
    match p {
        Place::Generic => Class::Generic,
        Place::Global => Class::Global,
        Place::Shared => Class::Shared,
        Place::Local => Class::Local,
        Place::Param => Class::Param,
    }
}

impl Body<'_, '_> {
    /// And whether the scope is wider than a block, as it is where none is given. A cluster has one block.
    fn strength(&mut self) -> (Strength, bool) {
        let s = self.mods.find(|m| {
            Some(match m {
                "weak" => Strength::Weak,
                "volatile" | "relaxed" => Strength::Strong,
                "acquire" => Strength::Acquire,
                "release" => Strength::Release,
                "acq_rel" => Strength::AcqRel,
                _ => return None,
            })
        });
        let narrow = self.mods.any(&["cta", "cluster"]);
        self.mods.any(&["gpu", "sys", "mmio"]);
        (s.unwrap_or(Strength::Weak), !narrow)
    }

    pub(super) fn memory(&mut self) -> Result<bool> {
        match self.instr.opcode.as_str() {
            "ld" | "ldu" | "st" => self.load_store(),
            "atom" | "red" => self.atomic(),
            "prefetch" | "prefetchu" | "applypriority" | "discard" => {
                // `prefetch.tensormap` and the like: hints without effect on results.
                let rest: Vec<String> = self.instr.mods.clone();
                for m in &rest {
                    self.mods.take(m);
                }
                self.class = Class::Global;
                self.emit(Inst { kind: Kind::Nop, ..self.blank() })?;
                Ok(true)
            }
            "createpolicy" => {
                let rest: Vec<String> = self.instr.mods.clone();
                for m in &rest {
                    self.mods.take(m);
                }
                let d = self.dst(0, Ty::B64)?;
                let zero = self.constant(2, 0)?;
                self.alu(crate::lanes::op1(|a: u64| a), d, &[zero], 0)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn load_store(&mut self) -> Result<bool> {
        let store = self.instr.opcode == "st";
        if self.mods.any(&["async", "bulk"]) {
            return self.fail("asynchronous stores need a cluster and are not supported");
        }
        let (strength, wide) = self.strength();
        self.mods.take("nc");
        self.mods.hints();
        self.mods.any(&["evict_first", "evict_last", "no_allocate"]);
        let place = self.mods.find(place).unwrap_or(Place::Generic);
        let vector = self.mods.find(|m| match m {
            "v2" => Some(2usize),
            "v4" => Some(4),
            "v8" => Some(8),
            _ => None,
        });
        let Some(ty) = self.mods.ty() else {
            return Ok(false);
        };
        if matches!(ty, Ty::Pred | Ty::B128) {
            return self.fail("this type is not supported in memory");
        }
        // A cache policy may follow.
        self.arity(2, 3)?;
        let (address, value) =
            if store { (self.operand(0)?, self.operand(1)?) } else { (self.operand(1)?, self.operand(0)?) };
        let one = std::slice::from_ref(value);
        let parts = match value {
            Operand::Vector(v) => v.as_slice(),
            _ => one,
        };
        if parts.len() != vector.unwrap_or(1) {
            return self.fail("the number of registers does not fit the vector");
        }
        if ty.bytes() as usize * parts.len() > 32 {
            return self.fail("an access has at most 32 bytes");
        }
        let mut regs = Vec::new();
        for p in parts {
            let reg = match p {
                Operand::Sink if !store => (NONE, 1),
                p => {
                    let r = if store { self.value_any(p, ty)? } else { self.dst_of(p)? };
                    if r.words * 4 < ty.bytes() && !(r.words == 1 && ty.bytes() <= 4) {
                        return self.fail("a register is narrower than the access");
                    }
                    if r.ty.bytes() < ty.bytes() || r.words == 0 {
                        return self.fail("a register is narrower than the access");
                    }
                    (r.at, if r.ty.bytes() < 4 { HALF } else { r.words })
                }
            };
            regs.push(reg);
        }
        self.class = class(place);
        if place == Place::Param {
            if let Some(offset) = self.kernel_param(address)? {
                if store {
                    return self.fail("kernel parameters cannot be written");
                }
                for (k, (d, words)) in regs.iter().enumerate() {
                    let offset = offset + k as u32 * ty.bytes();
                    let kind = Kind::LoadParam { offset, bytes: ty.bytes(), signed: ty.signed(), words: *words };
                    self.emit(Inst { d: *d, kind, ..self.blank() })?;
                }
                return Ok(true);
            }
            if let Operand::Address { base, .. } = address
                && let Operand::Name(n) = base.as_ref()
                && self.register(n)?.is_none()
            {
                // Parameters of functions lie in the frame's local memory.
                let address = self.address(address)?;
                let access = Access {
                    place: Place::Local,
                    store,
                    bytes: ty.bytes(),
                    signed: ty.signed(),
                    regs,
                    address,
                    strength,
                    wide,
                };
                self.emit(Inst { kind: Kind::Access(Box::new(access)), ..self.blank() })?;
                return Ok(true);
            }
        }
        let address = self.address(address)?;
        let access = Access { place, store, bytes: ty.bytes(), signed: ty.signed(), regs, address, strength, wide };
        self.emit(Inst { kind: Kind::Access(Box::new(access)), ..self.blank() })?;
        Ok(true)
    }

    fn atomic(&mut self) -> Result<bool> {
        let red = self.instr.opcode == "red";
        if self.mods.take("async") {
            return self.fail("asynchronous reductions need a cluster and are not supported");
        }
        let (mut strength, wide) = self.strength();
        if strength == Strength::Weak {
            strength = Strength::Strong;
        }
        self.mods.hints();
        let place = self.mods.find(place).unwrap_or(Place::Generic);
        let op = self.mods.find(|m| {
            Some(match m {
                "add" => AtomOp::Add,
                "min" => AtomOp::Min,
                "max" => AtomOp::Max,
                "and" => AtomOp::And,
                "or" => AtomOp::Or,
                "xor" => AtomOp::Xor,
                "exch" => AtomOp::Exch,
                "cas" => AtomOp::Cas,
                "inc" => AtomOp::Inc,
                "dec" => AtomOp::Dec,
                _ => return None,
            })
        });
        let ftz = !self.mods.take("noftz");
        let vector = self.mods.find(|m| match m {
            "v2" => Some(2usize),
            "v4" => Some(4),
            "v8" => Some(8),
            _ => None,
        });
        let (Some(op), Some(ty)) = (op, self.mods.ty()) else {
            return Ok(false);
        };
        let kind = match ty {
            Ty::F32 => AtomTy::F32,
            Ty::F64 => AtomTy::F64,
            Ty::F16 => AtomTy::F16,
            Ty::F16x2 => AtomTy::F16x2,
            Ty::Bf16 => AtomTy::Bf16,
            Ty::Bf16x2 => AtomTy::Bf16x2,
            Ty::S32 | Ty::S64 => AtomTy::Signed,
            Ty::U32 | Ty::U64 | Ty::B32 | Ty::B64 | Ty::B16 => AtomTy::Unsigned,
            _ => return self.fail("atomics of this type are not supported"),
        };
        let float = !matches!(kind, AtomTy::Unsigned | AtomTy::Signed);
        let fits = match op {
            AtomOp::Add => true,
            AtomOp::Min | AtomOp::Max => !matches!(kind, AtomTy::F64),
            AtomOp::Inc | AtomOp::Dec => ty == Ty::U32,
            _ => !float,
        };
        if !fits || (ty == Ty::B16 && op != AtomOp::Cas) {
            return self.fail("this operation does not go with this type");
        }
        let first = usize::from(!red);
        let n = if op == AtomOp::Cas { first + 3 } else { first + 2 };
        // A cache policy may follow.
        self.arity(n, n + 1)?;
        let o = self.operand(first)?;
        let address = self.address(o)?;
        let list = |o: &'_ Operand| match o {
            Operand::Vector(v) => v.clone(),
            o => vec![o.clone()],
        };
        let values = list(self.operand(first + 1)?);
        let results = if red { vec![Operand::Sink; values.len()] } else { list(self.operand(0)?) };
        if values.len() != vector.unwrap_or(1) || results.len() != values.len() {
            return self.fail("the number of registers does not fit the vector");
        }
        let mut elements = Vec::new();
        for (r, v) in results.iter().zip(&values) {
            let value = self.value(v, ty)?;
            let second = if op == AtomOp::Cas { self.src(first + 2, ty)? } else { NONE };
            let d = match r {
                Operand::Sink => NONE,
                r => self.dst_as(r, ty)?,
            };
            elements.push((d, value, second));
        }
        self.class = Class::Atomic;
        let atom = Atom { place, op, ty: kind, bytes: ty.bytes(), address, elements, strength, wide, ftz };
        self.emit(Inst { kind: Kind::Atom(Box::new(atom)), ..self.blank() })?;
        Ok(true)
    }
}
