//! What names stand for: registers, special registers, variables, parameters, functions.

use super::body::{Body, Reg, words_of};
use super::{CODE_WINDOW, MAX_LOCAL, PARAM_WINDOW, Result};
use crate::arch::{MAX_PARAM_BYTES, SHARED_DEFAULT};
use crate::error::LoadError;
use crate::program::{Slot, Special};
use crate::ptx::ast::{Operand, Space, Ty, Var};
use std::collections::{HashMap, HashSet};

/// What a name in scope stands for.
#[derive(Clone, Copy)]
pub(super) enum Sym {
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
pub(super) struct Scope {
    pub names: HashMap<String, Sym>,
    /// `%r<7>`: prefix to count and type.
    pub families: HashMap<String, (u64, Ty)>,
    /// Label to its number.
    pub labels: HashMap<String, u32>,
    pub targets: HashMap<String, Vec<String>>,
    pub prototypes: HashSet<String>,
    pub regs: HashMap<String, u32>,
}

impl Body<'_, '_> {
    pub(super) fn scope(&mut self) -> &mut Scope {
        if self.scopes.is_empty() {
            self.scopes.push(Scope::default());
        }
        let last = self.scopes.len() - 1;
        &mut self.scopes[last]
    }

    pub(super) fn formal(&mut self, v: &Var) -> Result<Slot> {
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

    pub(super) fn symbol(&mut self, name: &str) -> Result<Option<(usize, Sym)>> {
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

    /// A register or special register of any type.
    pub(super) fn any_register(&mut self, name: &str) -> Result<Option<Reg>> {
        match self.register(name)? {
            Some(r) => Ok(Some(r)),
            None => self.special_register(name),
        }
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

    /// Offset of the kernel parameter that `[name + offset]` names.
    pub(super) fn kernel_param(&mut self, o: &Operand) -> Result<Option<u32>> {
        if let Operand::Address { base, offset, .. } = o
            && let Operand::Name(n) = base.as_ref()
            && let Some((_, Sym::Param(at))) = self.symbol(n)?
        {
            // Reads beyond the kernel's own parameters are reported when they happen.
            let at = i64::from(at).checked_add(*offset).and_then(|at| u32::try_from(at).ok());
            return match at.filter(|at| *at < MAX_PARAM_BYTES) {
                Some(at) => Ok(Some(at)),
                None => self.fail(format!("this offset lies outside the {MAX_PARAM_BYTES} bytes of kernel parameters")),
            };
        }
        Ok(None)
    }

    pub(super) fn declare(&mut self, v: &Var) -> Result<()> {
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
}
