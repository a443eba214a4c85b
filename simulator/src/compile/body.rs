//! One function: scopes, registers, labels, and the dispatch of its instructions.

use super::mods::Mods;
use super::{CODE_WINDOW, PARAM_WINDOW};
use super::{MAX_CODE, MAX_FRAME, MAX_LOCAL, Result, Unit};
use crate::arch::SHARED_DEFAULT;
use crate::device::Param;
use crate::error::LoadError;
use crate::lanes;
use crate::program::*;
use crate::ptx::ast::{Func, Instr, Operand, Space, Stmt, Ty, Var};
use std::collections::{HashMap, HashSet};

/// What a name in scope stands for.
#[derive(Clone, Copy)]
enum Sym {
    Reg(Ty),
    /// In the frame's local memory: byte offset and bytes.
    Local(u32, u32),
    Shared(u32),
    Dynamic,
    Global(u64),
    /// Kernel parameter: offset and bytes.
    Param(u32),
}

#[derive(Default)]
struct Scope {
    names: HashMap<String, Sym>,
    /// `%r<7>`: prefix to count and type.
    families: HashMap<String, (u64, Ty)>,
    /// Label to its number.
    labels: HashMap<String, u32>,
    targets: HashMap<String, Vec<String>>,
    prototypes: HashSet<String>,
    regs: HashMap<String, u32>,
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
    func_name: &'a str,
    entry: bool,
    scopes: Vec<Scope>,
    /// Scopes by order of opening, filled by the first pass over labels.
    label_scopes: Vec<HashMap<String, u32>>,
    opened: usize,
    label_pcs: Vec<Option<u32>>,
    fixups: Vec<(usize, usize, u32)>,
    words: u32,
    pred_page: (u32, u32),
    consts: HashMap<(u32, u64), u32>,
    specials: HashMap<Special, u32>,
    local: u64,
    carry: u32,
}

fn words_of(ty: Ty) -> u32 {
    match ty {
        Ty::Pred => 0,
        Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 => 2,
        Ty::B128 => 4,
        _ => 1,
    }
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

    fn scope(&mut self) -> &mut Scope {
        if self.scopes.is_empty() {
            self.scopes.push(Scope::default());
        }
        let last = self.scopes.len() - 1;
        &mut self.scopes[last]
    }

    fn formal(&mut self, v: &Var) -> Result<Slot> {
        if v.space == Space::Reg {
            let at = if v.ty == Ty::Pred { self.new_pred()? } else { self.new_words(words_of(v.ty))? };
            self.scopes[0].names.insert(v.name.clone(), Sym::Reg(v.ty));
            self.scopes[0].regs.insert(v.name.clone(), at);
            return Ok(if v.ty == Ty::Pred { Slot::Pred(at) } else { Slot::Reg(at, words_of(v.ty)) });
        }
        let (at, bytes) = self.local_var(v)?;
        self.scopes[0].names.insert(v.name.clone(), Sym::Local(at, bytes));
        Ok(Slot::Local(at, bytes))
    }

    fn local_var(&mut self, v: &Var) -> Result<(u32, u32)> {
        // Parameters are loaded 16 bytes at a time where the caller's layout allows it.
        let align = if v.space == Space::Param { v.align.max(16) } else { v.align.max(1) };
        let at = self.local.next_multiple_of(align.into());
        let bytes = v.bytes();
        self.local = at.saturating_add(bytes);
        if self.local > MAX_LOCAL.into() {
            return Err(LoadError::new(v.line, &v.name, format!("more than {MAX_LOCAL} bytes of local memory")));
        }
        Ok((at as u32, bytes as u32))
    }

    fn new_words(&mut self, words: u32) -> Result<u32> {
        let at = self.words;
        self.words += words.max(1) * 32;
        if self.words > MAX_FRAME {
            return self.fail(format!("the function {} uses too many registers", self.func_name));
        }
        Ok(at)
    }

    fn new_pred(&mut self) -> Result<u32> {
        if self.pred_page.1 == 0 {
            self.pred_page = (self.new_words(1)?, 32);
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

    fn lookup(&mut self, name: &str) -> Option<(usize, Sym)> {
        let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
        for (i, s) in self.scopes.iter().enumerate().rev() {
            if let Some(sym) = s.names.get(name) {
                return Some((i, *sym));
            }
            if let Some((count, ty)) = s.families.get(prefix)
                && let Ok(n) = name[prefix.len()..].parse::<u64>()
                && n < *count
            {
                return Some((i, Sym::Reg(*ty)));
            }
        }
        if let Some(a) = self.unit.globals.get(name) {
            return Some((0, Sym::Global(*a)));
        }
        let v = self.unit.shared_vars.get(name).copied()?;
        if v.count == 0 || (v.external && v.is_array) {
            self.unit.dynamic_align = self.unit.dynamic_align.max(v.align);
            return Some((0, Sym::Dynamic));
        }
        self.unit.shared.get(name).copied().map(|at| (0, Sym::Shared(at)))
    }

    /// Gives a module-level shared variable its place on first use.
    fn place_shared(&mut self, name: &str) -> Result<()> {
        if self.unit.shared.contains_key(name) {
            return Ok(());
        }
        if let Some(v) = self.unit.shared_vars.get(name).copied()
            && !(v.count == 0 || (v.external && v.is_array))
        {
            let at = self.shared_var(v)?;
            self.unit.shared.insert(name.to_owned(), at);
        }
        Ok(())
    }

    fn shared_var(&mut self, v: &Var) -> Result<u32> {
        let at = self.unit.shared_bytes.next_multiple_of(v.align.max(1).into());
        self.unit.shared_bytes = at.saturating_add(v.bytes());
        // The assembler's limit: all that a block can have only where the target is one architecture alone.
        let most = match self.unit.tree.target.ends_with('a') {
            true => u64::from(self.unit.arch.shared_per_block_optin),
            false => u64::from(SHARED_DEFAULT),
        };
        if self.unit.shared_bytes > most {
            return Err(LoadError::new(v.line, &v.name, format!("more than {most} bytes of static shared memory")));
        }
        Ok(at as u32)
    }

    fn symbol(&mut self, name: &str) -> Result<Option<(usize, Sym)>> {
        self.place_shared(name)?;
        Ok(self.lookup(name))
    }

    /// The register called `name`.
    pub(super) fn register(&mut self, name: &str) -> Result<Option<Reg>> {
        let Some((scope, Sym::Reg(ty))) = self.symbol(name)? else {
            return Ok(None);
        };
        if let Some(at) = self.scopes[scope].regs.get(name) {
            return Ok(Some(Reg { at: *at, words: words_of(ty), ty }));
        }
        let at = if ty == Ty::Pred { self.new_pred()? } else { self.new_words(words_of(ty))? };
        self.scopes[scope].regs.insert(name.to_owned(), at);
        Ok(Some(Reg { at, words: words_of(ty), ty }))
    }

    fn special_register(&mut self, name: &str) -> Result<Option<Reg>> {
        let axis = |n: &str| match n.rsplit('.').next() {
            Some("x") => Some(0u8),
            Some("y") => Some(1),
            Some("z") => Some(2),
            _ => None,
        };
        let base = name.split('.').next().unwrap_or(name);
        let special = match (base, axis(name)) {
            ("%tid", Some(a)) => Special::Tid(a),
            ("%ntid", Some(a)) => Special::Ntid(a),
            ("%ctaid", Some(a)) => Special::Ctaid(a),
            ("%nctaid", Some(a)) => Special::Nctaid(a),
            // Clusters have one block.
            ("%clusterid", Some(a)) => Special::Ctaid(a),
            ("%nclusterid", Some(a)) => Special::Nctaid(a),
            ("%cluster_ctaid", Some(_)) | ("%cluster_ctarank" | "%is_explicit_cluster", None) => {
                let at = self.constant(1, 0)?;
                return Ok(Some(Reg { at, words: 1, ty: Ty::U32 }));
            }
            ("%cluster_nctaid", Some(_)) | ("%cluster_nctarank", None) => {
                let at = self.constant(1, 1)?;
                return Ok(Some(Reg { at, words: 1, ty: Ty::U32 }));
            }
            ("WARP_SZ", None) => {
                let at = self.constant(1, 32)?;
                return Ok(Some(Reg { at, words: 1, ty: Ty::U32 }));
            }
            ("%laneid", None) => Special::LaneId,
            ("%warpid", None) => Special::WarpId,
            ("%nwarpid", None) => Special::NWarpId,
            ("%smid", None) => Special::SmId,
            ("%nsmid", None) => Special::NSmId,
            ("%gridid", None) => Special::GridId,
            ("%lanemask_eq", None) => Special::LaneMask(0),
            ("%lanemask_le", None) => Special::LaneMask(1),
            ("%lanemask_lt", None) => Special::LaneMask(2),
            ("%lanemask_ge", None) => Special::LaneMask(3),
            ("%lanemask_gt", None) => Special::LaneMask(4),
            ("%dynamic_smem_size", None) => Special::TotalShared(true),
            ("%total_smem_size", None) => Special::TotalShared(false),
            _ => return Ok(None),
        };
        let at = self.special(special)?;
        let (words, ty) = if special == Special::GridId { (2, Ty::U64) } else { (1, Ty::U32) };
        Ok(Some(Reg { at, words, ty }))
    }

    /// The address of a variable or function as a 64-bit constant.
    pub(super) fn address_of(&mut self, name: &str, offset: i64) -> Result<Option<u32>> {
        let at = match self.symbol(name)? {
            Some((_, Sym::Global(a))) => self.constant(2, a.wrapping_add(offset as u64))?,
            Some((_, Sym::Shared(a))) => self.constant(2, u64::from(a).wrapping_add(offset as u64))?,
            Some((_, Sym::Param(a))) => self.constant(2, (PARAM_WINDOW + u64::from(a)).wrapping_add(offset as u64))?,
            Some((_, Sym::Local(a, _))) if offset == 0 => self.special(Special::Local(a))?,
            Some((_, Sym::Dynamic)) if offset == 0 => self.special(Special::DynamicShared)?,
            Some((_, Sym::Local(..) | Sym::Dynamic)) => {
                return self.fail("an offset from this variable is not supported here");
            }
            Some((_, Sym::Reg(_))) => return Ok(None),
            None => match self.unit.numbers.get(name) {
                Some(i) => self.constant(2, CODE_WINDOW + u64::from(*i))?,
                None => return Ok(None),
            },
        };
        Ok(Some(at))
    }

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
                    if r.words == words {
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
        self.part(Inst { alu: lanes::op1(|a: u64| a as u32), d, a: at, ..self.blank() })?;
        Ok(d)
    }

    /// A register or special register of any type.
    pub(super) fn any_register(&mut self, name: &str) -> Result<Option<Reg>> {
        match self.register(name)? {
            Some(r) => Ok(Some(r)),
            None => self.special_register(name),
        }
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

    /// An operand as a destination of `ty`'s width.
    pub(super) fn dst(&mut self, i: usize, ty: Ty) -> Result<u32> {
        let r = self.dst_any(i)?;
        if r.words != words_of(ty) {
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

    /// Offset of the kernel parameter that `[name + offset]` names.
    pub(super) fn kernel_param(&mut self, o: &Operand) -> Result<Option<u32>> {
        if let Operand::Address { base, offset, .. } = o
            && let Operand::Name(n) = base.as_ref()
            && let Some((_, Sym::Param(at))) = self.symbol(n)?
        {
            return Ok(u32::try_from(i64::from(at) + offset).ok());
        }
        Ok(None)
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

    pub(super) fn emit(&mut self, inst: Inst) -> Result<()> {
        self.push(inst, self.class)
    }

    /// A helper before the instruction itself: counted with it.
    pub(super) fn part(&mut self, inst: Inst) -> Result<()> {
        self.push(inst, Class::Part)
    }

    fn push(&mut self, inst: Inst, class: Class) -> Result<()> {
        if self.unit.code.len() > MAX_CODE {
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
    pub(super) fn alu(&mut self, alu: AluFn, d: u32, s: &[u32], e: u32) -> Result<()> {
        let at = |i: usize| s.get(i).copied().unwrap_or(NONE);
        self.emit(Inst { alu, d, a: at(0), b: at(1), c: at(2), e, ..self.blank() })
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

    fn declare(&mut self, v: &Var) -> Result<()> {
        let wrong = |m: &str| Err(LoadError::new(v.line, &v.name, m));
        if v.space == Space::Reg {
            match v.family {
                Some(n) => self.scope().families.insert(v.name.clone(), (n, v.ty)),
                None => {
                    self.scope().names.insert(v.name.clone(), Sym::Reg(v.ty));
                    self.scope().regs.remove(&v.name);
                    None
                }
            };
            return Ok(());
        }
        if v.family.is_some() {
            return wrong("only registers can be declared in numbered families");
        }
        let sym = match v.space {
            Space::Local | Space::Param => {
                let (at, bytes) = self.local_var(v)?;
                Sym::Local(at, bytes)
            }
            Space::Shared if v.count == 0 => Sym::Dynamic,
            Space::Shared => Sym::Shared(self.shared_var(v)?),
            Space::Global | Space::Const => match self.unit.globals.get(&format!("{}::{}", self.func_name, v.name)) {
                Some(a) => Sym::Global(*a),
                None => return wrong("this variable is not known"),
            },
            Space::Reg => return wrong("this declaration is not supported"),
        };
        self.scope().names.insert(v.name.clone(), sym);
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
        let known = self.control()? || self.integer()? || self.float()? || self.convert()? || self.memory()?;
        let known = known || self.sync()? || self.matrix()? || self.tensor()? || self.video()?;
        if !known {
            return self.fail("this instruction is not supported");
        }
        match self.mods.rest().first() {
            Some(m) => self.fail(format!("the modifier .{m} is not supported here")),
            None => Ok(()),
        }
    }

    /// Branches, calls, exits.
    fn control(&mut self) -> Result<bool> {
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
                let labels = self.scopes.iter().rev().find_map(|s| s.targets.get(list)).cloned();
                let Some(labels) = labels else {
                    return self.fail(format!("`{list}` is no list of labels"));
                };
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
