//! One function: its registers and labels, its statements, and the dispatch of its instructions.

use super::mods::Mods;
use super::names::{Scope, Sym};
use super::{MAX_CODE, MAX_FRAME, Result, Unit};
use crate::device::Param;
use crate::error::LoadError;
use crate::lanes::{self, Alu, Width};
use crate::program::*;
use crate::ptx::ast::{Func, Instr, Operand, Stmt, Ty};
use std::collections::HashMap;

/// Words of a register for each lane; 0 for a predicate, which is one bit.
pub(super) fn words_of(ty: Ty) -> u32 {
    match ty {
        Ty::Pred => 0,
        Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 => 2,
        Ty::B128 => 4,
        _ => 1,
    }
}

/// A register as an operand: word offset and words (0 for a predicate).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reg {
    pub at: u32,
    pub words: u32,
    pub ty: Ty,
}

pub(super) struct Body<'u, 'a> {
    pub unit: &'u mut Unit<'a>,
    pub instr: &'a Instr,
    pub mods: Mods<'a>,
    pub class: Class,
    pub flops: u8,
    parts: u32,
    guard: (u32, bool),
    text: u32,
    pub(super) func_name: &'a str,
    pub(super) entry: bool,
    pub(super) scopes: Vec<Scope>,
    /// Scopes by order of opening, filled by the first pass over labels.
    label_scopes: Vec<HashMap<String, u32>>,
    opened: usize,
    label_pcs: Vec<Option<u32>>,
    pub(super) fixups: Vec<(usize, usize, u32)>,
    words: u32,
    /// What each line of 32 words of the frame holds; the second half of a wide register is `Nothing`.
    lines: Vec<Width>,
    pred_page: (u32, u32),
    consts: HashMap<(u32, u64), u32>,
    specials: HashMap<Special, u32>,
    pub(super) local: u64,
    carry: u32,
}

pub(super) fn function<'a>(unit: &mut Unit<'a>, f: &'a Func, kernel_params: &[Param]) -> Result<FuncInfo> {
    static EMPTY: Instr = Instr {
        line: 0,
        text: String::new(),
        guard: None,
        opcode: String::new(),
        mods: Vec::new(),
        operands: Vec::new(),
    };
    let body = f.body.as_deref().unwrap_or(&[]);
    let (label_scopes, labels) = collect_labels(body)?;
    let start = unit.code.len() as u32;
    let mut b = Body {
        unit,
        instr: &EMPTY,
        mods: Mods::new(&[]),
        class: Class::Integer,
        flops: 0,
        parts: 0,
        guard: (NONE, false),
        text: 0,
        func_name: &f.name,
        entry: f.entry,
        scopes: vec![Scope::default()],
        label_scopes,
        opened: 0,
        label_pcs: vec![None; labels as usize],
        fixups: Vec::new(),
        words: 32,
        lines: vec![Width::Nothing],
        pred_page: (0, 0),
        consts: HashMap::new(),
        specials: HashMap::new(),
        local: 0,
        carry: NONE,
    };
    b.scopes[0].labels = b.label_scopes[0].clone();
    let (mut params, mut returns) = (Vec::new(), Vec::new());
    if f.entry {
        for p in kernel_params {
            b.scopes[0].names.insert(p.name.clone(), Sym::Param(p.offset));
        }
    } else {
        for v in &f.params {
            params.push(b.formal(v)?);
        }
        for v in &f.returns {
            returns.push(b.formal(v)?);
        }
    }
    for s in body {
        b.statement(s)?;
    }
    b.instr = &EMPTY;
    b.guard = (NONE, false);
    b.class = Class::Control;
    b.parts = 0;
    b.emit(Inst { kind: if f.entry { Kind::Exit } else { Kind::Ret }, ..b.blank() })?;
    b.finish(start, params, returns)
}

/// Numbers the labels of each scope, in the order in which the scopes open.
fn collect_labels(body: &[Stmt]) -> Result<(Vec<HashMap<String, u32>>, u32)> {
    let (mut scopes, mut stack, mut count) = (vec![HashMap::new()], vec![0usize], 0);
    for s in body {
        match s {
            Stmt::Open => {
                stack.push(scopes.len());
                scopes.push(HashMap::new());
            }
            Stmt::Close => {
                stack.pop();
            }
            Stmt::Label(name, line) => {
                let top = stack.last().copied().unwrap_or(0);
                if scopes[top].insert(name.clone(), count).is_some() {
                    return Err(LoadError::new(*line, name, "this label is defined twice in its scope"));
                }
                count += 1;
            }
            _ => {}
        }
    }
    Ok((scopes, count))
}

impl<'u, 'a> Body<'u, 'a> {
    pub(super) fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(LoadError::new(self.instr.line, &self.instr.text, message))
    }

    pub(super) fn new_words(&mut self, words: u32) -> Result<u32> {
        self.new_place(words.max(1), if words == 2 { Width::Double } else { Width::Single })
    }

    fn new_place(&mut self, words: u32, holds: Width) -> Result<u32> {
        let at = self.words;
        self.words += words * 32;
        if self.words > MAX_FRAME {
            return self.fail(format!("the function {} uses too many registers", self.func_name));
        }
        self.lines.push(holds);
        self.lines.resize((self.words / 32) as usize, Width::Nothing);
        Ok(at)
    }

    pub(super) fn new_pred(&mut self) -> Result<u32> {
        if self.pred_page.1 == 0 {
            self.pred_page = (self.new_place(1, Width::Pred)?, 32);
        }
        self.pred_page.1 -= 1;
        Ok(self.pred_page.0 + self.pred_page.1)
    }

    /// A register that no name refers to.
    pub(super) fn temp(&mut self, words: u32) -> Result<u32> {
        self.new_words(words)
    }

    pub(super) fn carry(&mut self) -> Result<u32> {
        if self.carry == NONE {
            self.carry = self.new_pred()?;
        }
        Ok(self.carry)
    }

    /// A register that holds `value` in every lane.
    pub(super) fn constant(&mut self, words: u32, value: u64) -> Result<u32> {
        let value = if words == 1 { value & 0xffff_ffff } else { value };
        if let Some(at) = self.consts.get(&(words, value)) {
            return Ok(*at);
        }
        let at = if words == 0 { self.new_pred()? } else { self.new_words(words)? };
        self.consts.insert((words, value), at);
        Ok(at)
    }

    pub(super) fn special(&mut self, s: Special) -> Result<u32> {
        if let Some(at) = self.specials.get(&s) {
            return Ok(*at);
        }
        let at = self.new_words(if matches!(s, Special::GridId | Special::Local(_) | Special::DynamicShared) {
            2
        } else {
            1
        })?;
        self.specials.insert(s, at);
        Ok(at)
    }

    /// An instruction with no operands and the current guard.
    pub(super) fn blank(&self) -> Inst {
        Inst {
            alu: lanes::idle(),
            d: NONE,
            a: NONE,
            b: NONE,
            c: NONE,
            e: 0,
            guard: self.guard.0,
            guard_not: self.guard.1,
            kind: Kind::Alu,
        }
    }

    /// Whether the current instruction is guarded by this predicate.
    pub(super) fn is_guard(&self, pred: u32) -> bool {
        pred != NONE && pred == self.guard.0
    }

    pub(super) fn emit(&mut self, inst: Inst) -> Result<()> {
        self.push(inst, self.class)
    }

    /// `d = alu(a)` as a helper before the instruction itself: counted with it.
    pub(super) fn part(&mut self, alu: Alu, d: u32, a: u32) -> Result<()> {
        let inst = Inst { alu: alu.run, d, a, ..self.blank() };
        self.check_widths(&alu, &inst)?;
        self.push(inst, Class::Part)
    }

    fn push(&mut self, inst: Inst, class: Class) -> Result<()> {
        if self.unit.code.len() + self.unit.targets > MAX_CODE {
            return self.fail(format!("the kernel has more than {MAX_CODE} instructions"));
        }
        let class = if self.parts > 0 && class != Class::Part { Class::Part } else { class };
        if class != Class::Part {
            self.parts += 1;
        }
        let flops = if class == Class::Part { 0 } else { self.flops };
        self.unit.code.push(inst);
        self.unit.source.push(Source { line: self.instr.line, text: self.text, class, flops });
        Ok(())
    }

    /// Emits `alu` with a destination and up to three sources.
    pub(super) fn alu(&mut self, alu: Alu, d: u32, s: &[u32], e: u32) -> Result<()> {
        let at = |i: usize| s.get(i).copied().unwrap_or(NONE);
        let inst = Inst { alu: alu.run, d, a: at(0), b: at(1), c: at(2), e, ..self.blank() };
        self.check_widths(&alu, &inst)?;
        self.emit(inst)
    }

    /// Requires that every operand is as wide as the operation takes it for. `types` and the checks of operands see to
    /// that, so this never fails; but an operation that wrote beyond its register would corrupt the host's memory.
    fn check_widths(&self, alu: &Alu, inst: &Inst) -> Result<()> {
        let holds = |at: u32| self.lines.get(at as usize / 32).copied().unwrap_or(Width::Nothing);
        let fits = |(width, at): (Width, u32)| match width {
            Width::Nothing => true,
            Width::Pred => holds(at) == Width::Pred,
            Width::PredOrNone => at == NONE || holds(at) == Width::Pred,
            Width::Join => at & 7 == 0 || holds(at >> 4) == Width::Pred,
            Width::Single | Width::Double => at.is_multiple_of(32) && holds(at) == width,
        };
        let operands = [inst.d, inst.a, inst.b, inst.c, inst.e];
        match alu.widths.into_iter().zip(operands).all(fits) {
            true => Ok(()),
            false => self.fail("the operation does not fit its registers: a fault of the simulator, please report it"),
        }
    }

    fn statement(&mut self, s: &'a Stmt) -> Result<()> {
        match s {
            Stmt::Open => {
                self.opened += 1;
                let labels = self.label_scopes.get(self.opened).cloned().unwrap_or_default();
                self.scopes.push(Scope { labels, ..Scope::default() });
            }
            Stmt::Close => {
                self.scopes.pop();
            }
            Stmt::Label(name, _) => {
                let pc = self.unit.code.len() as u32;
                if let Some(l) = self.scope().labels.get(name).copied() {
                    self.label_pcs[l as usize] = Some(pc);
                }
            }
            Stmt::Var(v) => self.declare(v)?,
            Stmt::Targets { name, labels } => {
                self.scope().targets.insert(name.clone(), labels.clone());
            }
            Stmt::Prototype { name, .. } => {
                self.scope().prototypes.insert(name.clone());
            }
            Stmt::Instr(i) => self.instruction(i)?,
        }
        Ok(())
    }

    fn instruction(&mut self, i: &'a Instr) -> Result<()> {
        self.instr = i;
        self.mods = Mods::new(&i.mods);
        self.text = self.unit.texts.len() as u32;
        self.unit.texts.push(if i.text.len() > 200 { i.text.chars().take(200).collect() } else { i.text.clone() });
        self.class = Class::Integer;
        self.flops = 0;
        self.parts = 0;
        self.guard = (NONE, false);
        if let Some((name, not)) = &i.guard {
            let (at, _) = self.pred(&Operand::Name(name.clone()))?;
            self.guard = (at, *not);
        }
        self.check_types()?;
        let known = self.control()? || self.integer()? || self.bits()? || self.moves()? || self.compare()?;
        let known = known || self.float()? || self.convert()? || self.memory()?;
        let known = known || self.sync()? || self.matrix()? || self.tensor()? || self.video()?;
        if !known {
            return self.fail("this instruction is not supported");
        }
        match self.mods.rest().first() {
            Some(m) => self.fail(format!("the modifier .{m} is not supported here")),
            None => Ok(()),
        }
    }

    fn finish(self, start: u32, params: Vec<Slot>, returns: Vec<Slot>) -> Result<FuncInfo> {
        for (inst, slot, label) in &self.fixups {
            let Some(pc) = self.label_pcs[*label as usize] else {
                return self.fail("a label has no place");
            };
            match &mut self.unit.code[*inst].kind {
                Kind::Jump(target) => *target = pc,
                Kind::Switch(targets) => targets[*slot] = pc,
                _ => return self.fail("a label is used by an instruction that cannot branch"),
            }
        }
        let mut consts: Vec<_> = self.consts.into_iter().map(|((words, value), at)| (at, words, value)).collect();
        consts.sort_unstable();
        let mut specials: Vec<_> = self.specials.into_iter().collect();
        specials.sort_unstable();
        Ok(FuncInfo {
            name: self.func_name.to_owned(),
            start,
            frame_words: self.words.next_multiple_of(32),
            consts,
            specials,
            local_bytes: (self.local as u32).next_multiple_of(16),
            params,
            returns,
        })
    }
}
