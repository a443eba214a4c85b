//! The modifiers of an instruction: taken one by one, and whatever is left over is refused.

use crate::ptx::ast::Ty;

pub(super) struct Mods<'a> {
    list: Vec<&'a str>,
}

impl<'a> Mods<'a> {
    pub(super) fn new(mods: &'a [String]) -> Self {
        Mods { list: mods.iter().map(String::as_str).collect() }
    }

    /// Removes `name` if it is there.
    pub(super) fn take(&mut self, name: &str) -> bool {
        let at = self.list.iter().position(|m| *m == name);
        if let Some(i) = at {
            self.list.remove(i);
        }
        at.is_some()
    }

    /// Removes the first modifier for which `f` gives something.
    pub(super) fn find<T>(&mut self, f: impl Fn(&str) -> Option<T>) -> Option<T> {
        let (i, hit) = self.list.iter().enumerate().find_map(|(i, m)| f(m).map(|v| (i, v)))?;
        self.list.remove(i);
        Some(hit)
    }

    pub(super) fn any(&mut self, names: &[&str]) -> bool {
        let before = self.list.len();
        self.list.retain(|m| !names.contains(m));
        self.list.len() != before
    }

    /// Removes the first type.
    pub(super) fn ty(&mut self) -> Option<Ty> {
        self.find(Ty::parse)
    }

    /// Removes hints that change speed only.
    pub(super) fn hints(&mut self) {
        self.list.retain(|m| {
            !(m.starts_with("L1::")
                || m.starts_with("L2::")
                || matches!(*m, "ca" | "cg" | "cs" | "lu" | "cv" | "wb" | "wt" | "unified"))
        });
    }

    pub(super) fn rest(&self) -> &[&'a str] {
        &self.list
    }
}
