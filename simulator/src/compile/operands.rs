//! Operands of instructions: sources, destinations, predicates, addresses, and what fits where.

use super::Result;
use super::body::{Body, Reg, words_of};
use super::names::Sym;
use crate::lanes;
use crate::program::{Addr, NONE, Slot};
use crate::ptx::ast::{Operand, Ty};

impl<'a> Body<'_, 'a> {
    pub(super) fn operand(&self, i: usize) -> Result<&'a Operand> {
        match self.instr.operands.get(i) {
            Some(o) => Ok(o),
            None => self.fail(format!("operand {} is missing", i + 1)),
        }
    }

    pub(super) fn count(&self) -> usize {
        self.instr.operands.len()
    }

    /// Requires between `low` and `high` operands.
    pub(super) fn arity(&self, low: usize, high: usize) -> Result<()> {
        let n = self.count();
        if n < low || n > high { self.fail(format!("expected {low} to {high} operands, found {n}")) } else { Ok(()) }
    }

    /// An operand read as a value of `ty`: word offset of a register, constant or special register.
    pub(super) fn value(&mut self, o: &Operand, ty: Ty) -> Result<u32> {
        let words = words_of(ty);
        let constant = |v: u64| match ty.bytes() {
            1 => v & 0xff,
            2 => v & 0xffff,
            4 => v & 0xffff_ffff,
            _ => v,
        };
        match o {
            Operand::Name(n) => {
                if let Some(r) = self.any_register(n)? {
                    if r.words == words && r.ty.bytes() == ty.bytes() {
                        return Ok(r.at);
                    }
                    // Special registers of 32 bits may be read as 64 (`mov.u64 %rd, %clock`).
                    return self.fail(format!("`{n}` is .{:?}, which does not fit .{ty:?}", r.ty).to_lowercase());
                }
                if let Some(at) = self.address_of(n, 0)? {
                    // A 32-bit use takes the low word.
                    return if words == 2 { Ok(at) } else { self.low_word(at) };
                }
                self.fail(format!("`{n}` is not declared"))
            }
            Operand::Int(i) if ty == Ty::F32 => self.constant(1, u64::from((*i as f32).to_bits())),
            Operand::Int(i) if ty == Ty::F64 => self.constant(2, (*i as f64).to_bits()),
            Operand::Int(i) if words > 0 => self.constant(words, constant(*i as u64)),
            Operand::F32(b) if words == 1 => self.constant(1, u64::from(*b)),
            Operand::F32(b) if ty == Ty::F64 => self.constant(2, f64::from(f32::from_bits(*b)).to_bits()),
            Operand::F64(b) if ty == Ty::F32 => self.constant(1, u64::from((f64::from_bits(*b) as f32).to_bits())),
            Operand::F64(b) if words == 2 => self.constant(2, *b),
            Operand::Sum(n, offset) => match self.address_of(n, *offset)? {
                Some(at) if words == 2 => Ok(at),
                Some(at) => self.low_word(at),
                None => self.fail(format!("`{n}` is no variable")),
            },
            _ => self.fail("this operand does not fit the instruction"),
        }
    }

    /// The low 32 bits of a 64-bit register, as a part of the current instruction.
    fn low_word(&mut self, at: u32) -> Result<u32> {
        let d = self.temp(1)?;
        self.part(lanes::op1(|a: u64| a as u32), d, at)?;
        Ok(d)
    }

    /// Operand `i` as a value.
    pub(super) fn src(&mut self, i: usize, ty: Ty) -> Result<u32> {
        let o = self.operand(i)?;
        self.value(o, ty)
    }

    /// Operand `i` as a register or constant of whatever width its register has; constants get `ty`.
    pub(super) fn src_any(&mut self, i: usize, ty: Ty) -> Result<Reg> {
        let o = self.operand(i)?;
        self.value_any(o, ty)
    }

    pub(super) fn value_any(&mut self, o: &Operand, ty: Ty) -> Result<Reg> {
        if let Operand::Name(n) = o
            && let Some(r) = self.any_register(n)?
        {
            return if r.words == 0 { self.fail("a predicate does not fit here") } else { Ok(r) };
        }
        Ok(Reg { at: self.value(o, ty)?, words: words_of(ty), ty })
    }

    /// Operand `i` as a destination of `ty`'s width.
    pub(super) fn dst(&mut self, i: usize, ty: Ty) -> Result<u32> {
        let o = self.operand(i)?;
        self.dst_as(o, ty)
    }

    /// An operand as a destination of `ty`'s width.
    pub(super) fn dst_as(&mut self, o: &Operand, ty: Ty) -> Result<u32> {
        let r = self.dst_of(o)?;
        if r.words != words_of(ty) || r.ty.bytes() != ty.bytes() {
            return self.fail(format!("the destination is .{:?}, which does not fit .{ty:?}", r.ty).to_lowercase());
        }
        Ok(r.at)
    }

    pub(super) fn dst_any(&mut self, i: usize) -> Result<Reg> {
        let o = self.operand(i)?;
        self.dst_of(o)
    }

    pub(super) fn dst_of(&mut self, o: &Operand) -> Result<Reg> {
        match o {
            Operand::Name(n) => match self.register(n)? {
                Some(r) => Ok(r),
                None => self.fail(format!("the destination `{n}` is not a register")),
            },
            _ => self.fail("the destination is not a register"),
        }
    }

    /// A predicate source with its negation.
    pub(super) fn pred(&mut self, o: &Operand) -> Result<(u32, bool)> {
        let (name, not) = match o {
            Operand::Name(n) => (n, false),
            Operand::Not(n) => (n, true),
            Operand::Int(v) => {
                return Ok((self.constant(0, if *v != 0 { u64::MAX } else { 0 })?, false));
            }
            _ => return self.fail("expected a predicate"),
        };
        match self.register(name)? {
            Some(r) if r.ty == Ty::Pred => Ok((r.at, not)),
            _ => self.fail(format!("`{name}` is not a predicate")),
        }
    }

    /// A predicate destination; `_` is `NONE`.
    pub(super) fn pred_dst(&mut self, o: &Operand) -> Result<u32> {
        match o {
            Operand::Sink => Ok(NONE),
            Operand::Name(_) => Ok(self.pred(o)?.0),
            _ => self.fail("expected a predicate as destination"),
        }
    }

    /// `[register + offset]`, `[variable + offset]`, `[number]`.
    pub(super) fn address(&mut self, o: &Operand) -> Result<Addr> {
        match o {
            Operand::Address { base, offset, more } if more.is_empty() => self.base(base, *offset),
            _ => self.fail("expected an address in brackets"),
        }
    }

    pub(super) fn base(&mut self, base: &Operand, offset: i64) -> Result<Addr> {
        match base {
            Operand::Name(n) => {
                if let Some(r) = self.register(n)? {
                    return match r.words {
                        1 if r.ty.bytes() == 4 => Ok(Addr { reg: r.at, wide: false, offset }),
                        2 => Ok(Addr { reg: r.at, wide: true, offset }),
                        _ => self.fail(format!("`{n}` cannot hold an address")),
                    };
                }
                match self.address_of(n, 0)? {
                    Some(reg) => Ok(Addr { reg, wide: true, offset }),
                    None => self.fail(format!("`{n}` is not declared")),
                }
            }
            Operand::Int(i) => Ok(Addr { reg: self.constant(2, *i as u64)?, wide: true, offset }),
            _ => self.fail("expected a register or variable as base of the address"),
        }
    }

    /// The argument or result of a call.
    pub(super) fn call_slot(&mut self, o: &Operand) -> Result<Slot> {
        if let Operand::Name(n) = o {
            if let Some((_, Sym::Local(at, bytes))) = self.symbol(n)? {
                return Ok(Slot::Local(at, bytes));
            }
            if let Some(r) = self.register(n)? {
                return Ok(if r.words == 0 { Slot::Pred(r.at) } else { Slot::Reg(r.at, r.words) });
            }
        }
        if let Operand::Int(_) | Operand::F32(_) = o {
            return Ok(Slot::Reg(self.value(o, Ty::B32)?, 1));
        }
        self.fail("this argument is not supported")
    }
}
