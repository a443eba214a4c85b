//! Branches, calls, exits.

use super::body::Body;
use super::{MAX_CODE, Result};
use crate::program::*;
use crate::ptx::ast::{Operand, Ty};

impl Body<'_, '_> {
    /// Branches, calls, exits.
    pub(super) fn control(&mut self) -> Result<bool> {
        self.class = Class::Control;
        match self.instr.opcode.as_str() {
            "bra" => {
                self.mods.take("uni");
                self.arity(1, 1)?;
                let Operand::Name(label) = self.operand(0)? else {
                    return self.fail("expected a label");
                };
                self.fix(label, 0)?;
                self.emit(Inst { kind: Kind::Jump(0), ..self.blank() })?;
            }
            "brx" => {
                self.mods.take("uni");
                if !self.mods.take("idx") {
                    return Ok(false);
                }
                self.arity(2, 2)?;
                let a = self.src(0, Ty::U32)?;
                let Operand::Name(list) = self.operand(1)? else {
                    return self.fail("expected a list of labels");
                };
                let Some(labels) = self.scopes.iter().rev().find_map(|s| s.targets.get(list)) else {
                    return self.fail(format!("`{list}` is no list of labels"));
                };
                // Each instruction has its own table: many of them with one long list are much more than their text.
                self.unit.targets += labels.len();
                if self.unit.code.len() + self.unit.targets > MAX_CODE {
                    return self.fail(format!("the kernel has more than {MAX_CODE} instructions and branch targets"));
                }
                let labels = labels.clone();
                for (slot, l) in labels.iter().enumerate() {
                    self.fix(l, slot)?;
                }
                self.emit(Inst { a, kind: Kind::Switch(vec![0; labels.len()].into()), ..self.blank() })?;
            }
            "ret" => {
                self.mods.take("uni");
                let kind = if self.entry { Kind::Exit } else { Kind::Ret };
                self.emit(Inst { kind, ..self.blank() })?;
            }
            "exit" => self.emit(Inst { kind: Kind::Exit, ..self.blank() })?,
            "trap" => self.emit(Inst { kind: Kind::Trap("trap"), ..self.blank() })?,
            "brkpt" => self.emit(Inst { kind: Kind::Trap("brkpt"), ..self.blank() })?,
            "call" => self.call()?,
            _ => {
                self.class = Class::Integer;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn call(&mut self) -> Result<()> {
        self.mods.take("uni");
        let ops = &self.instr.operands;
        let (returns, rest) = match ops.split_first() {
            Some((Operand::List(r), rest)) => (r.as_slice(), rest),
            _ => (&[][..], ops.as_slice()),
        };
        let Some((target, rest)) = rest.split_first() else {
            return self.fail("the function to call is missing");
        };
        let args = match rest.first() {
            Some(Operand::List(a)) => a.as_slice(),
            _ => &[],
        };
        let Operand::Name(name) = target else {
            return self.fail("expected a function to call");
        };
        let args = args.iter().map(|o| self.call_slot(o)).collect::<Result<Vec<_>>>()?;
        let returns = returns.iter().map(|o| self.call_slot(o)).collect::<Result<Vec<_>>>()?;
        if let Some(func) = self.unit.indices.get(name.as_str()).copied() {
            let tree = self.unit.tree;
            if let Some(f) = tree.funcs.iter().find(|f| f.name == *name)
                && (f.entry || f.params.len() != args.len() || f.returns.len() != returns.len())
            {
                return self.fail("the call does not fit the function's parameters");
            }
            let call = Call { func: Some(func), pointer: NONE, args, returns };
            return self.emit(Inst { kind: Kind::Call(Box::new(call)), ..self.blank() });
        }
        match name.as_str() {
            "__assertfail" => {
                return self.emit(Inst { kind: Kind::Trap("assertion failed"), ..self.blank() });
            }
            // Printing from a kernel is dropped; the result is the number of arguments printed.
            "vprintf" => {
                if let Some(Slot::Local(at, 4)) = returns.first() {
                    let (zero, reg) = (self.constant(1, 0)?, self.special(Special::Local(*at))?);
                    let access = Access {
                        place: Place::Local,
                        store: true,
                        bytes: 4,
                        signed: false,
                        regs: vec![(zero, 1)],
                        address: Addr { reg, wide: true, offset: 0 },
                        strength: Strength::Weak,
                        wide: true,
                    };
                    return self.emit(Inst { kind: Kind::Access(Box::new(access)), ..self.blank() });
                }
                return self.emit(Inst { kind: Kind::Nop, ..self.blank() });
            }
            _ => {}
        }
        match self.register(name)? {
            Some(r) if r.words == 2 => {
                let call = Call { func: None, pointer: r.at, args, returns };
                self.emit(Inst { kind: Kind::Call(Box::new(call)), ..self.blank() })
            }
            _ => self.fail(format!("the function `{name}` is not in this module")),
        }
    }

    /// Branch targets are filled in when all labels are known; `slot` is the entry of a switch.
    fn fix(&mut self, label: &str, slot: usize) -> Result<()> {
        let found = self.scopes.iter().rev().find_map(|s| s.labels.get(label)).copied();
        match found {
            Some(l) => {
                self.fixups.push((self.unit.code.len(), slot, l));
                Ok(())
            }
            None => self.fail(format!("the label `{label}` does not exist")),
        }
    }
}
