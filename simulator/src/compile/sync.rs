//! Barriers, fences, warp collectives, mbarriers, and asynchronous copies without tensors.

use super::Result;
use super::body::Body;
use super::memory::place;
use crate::program::*;
use crate::ptx::ast::{Operand, Ty};

impl Body<'_, '_> {
    /// Forgets modifiers that change nothing in a simulation without a weak memory model.
    fn forget(&mut self, names: &[&str]) {
        self.mods.any(names);
    }

    pub(super) fn sync(&mut self) -> Result<bool> {
        let op = self.instr.opcode.as_str();
        match op {
            "bar" | "barrier" => self.bar(op),
            "membar" | "fence" => {
                self.class = Class::Barrier;
                let has = |m: &str| self.instr.mods.iter().any(|x| x == m);
                let proxy = (has("async") || has("async::generic")) && !has("global");
                // Fences between the proxies and of mbarriers have no scope, or that of a cluster, which has one block.
                let wide = has("gl") || has("gpu") || has("sys");
                if self.mods.take("proxy") {
                    self.forget(&["alias", "async", "async::generic", "tensormap", "tensormap::generic"]);
                    self.forget(&["generic", "async.global", "async.shared", "acquire", "release", "sync_restrict"]);
                }
                let known = [
                    "gl",
                    "cta",
                    "sys",
                    "gpu",
                    "cluster",
                    "sc",
                    "acq_rel",
                    "acquire",
                    "release",
                    "global",
                    "shared::cta",
                    "shared::cluster",
                    "sync_restrict::shared::cta",
                    "sync_restrict::shared::cluster",
                    "mbarrier_init",
                    "tensormap::generic",
                    "async",
                    "proxy",
                    "alias",
                    "async::generic",
                    "generic::tensormap",
                ];
                self.forget(&known);
                let rest: Vec<String> = self
                    .mods
                    .rest()
                    .iter()
                    .filter(|m| m.starts_with("proxy") || m.starts_with("tensormap"))
                    .map(|m| (*m).to_owned())
                    .collect();
                for m in rest {
                    self.mods.take(&m);
                }
                self.emit(Inst { kind: Kind::Fence { proxy, wide }, ..self.blank() })?;
                Ok(true)
            }
            "shfl" => self.shfl(),
            "vote" => {
                self.mods.take("sync");
                let op = self.mods.find(|m| {
                    Some(match m {
                        "all" => Vote::All,
                        "any" => Vote::Any,
                        "uni" => Vote::Uni,
                        "ballot" => Vote::Ballot,
                        _ => return None,
                    })
                });
                let (Some(op), Some(ty)) = (op, self.mods.ty()) else {
                    return Ok(false);
                };
                self.class = Class::Warp;
                self.arity(3, 3)?;
                let p = self.operand(1)?;
                let source = self.pred(p)?;
                let b = self.src(2, Ty::B32)?;
                let o = self.operand(0)?;
                let d = if ty == Ty::Pred { self.pred_dst(o)? } else { self.dst(0, Ty::B32)? };
                self.emit(Inst { d, b, kind: Kind::Vote { op, source }, ..self.blank() })?;
                Ok(true)
            }
            "match" => {
                let all = self.mods.take("all");
                let any = self.mods.take("any");
                self.mods.take("sync");
                let Some(ty @ (Ty::B32 | Ty::B64)) = self.mods.ty() else {
                    return Ok(false);
                };
                if all == any {
                    return Ok(false);
                }
                self.class = Class::Warp;
                self.arity(3, 3)?;
                let (a, b) = (self.src(1, ty)?, self.src(2, Ty::B32)?);
                let (d, pred) = match self.operand(0)? {
                    Operand::Pair(d, p) => (self.dst_as(d, Ty::B32)?, self.pred_dst(p)?),
                    d => (self.dst_as(d, Ty::B32)?, NONE),
                };
                self.emit(Inst { d, a, b, kind: Kind::Match { all, wide: ty == Ty::B64, pred }, ..self.blank() })?;
                Ok(true)
            }
            "redux" => {
                self.mods.take("sync");
                let (absolute, nan) = (self.mods.take("abs"), self.mods.take("NaN"));
                let op = self.mods.find(|m| {
                    Some(match m {
                        "add" => Reduce::Add,
                        "min" => Reduce::Min,
                        "max" => Reduce::Max,
                        "and" => Reduce::And,
                        "or" => Reduce::Or,
                        "xor" => Reduce::Xor,
                        _ => return None,
                    })
                });
                let (Some(op), Some(ty)) = (op, self.mods.ty()) else {
                    return Ok(false);
                };
                if ty.bytes() != 4 {
                    return Ok(false);
                }
                let op = match (op, ty) {
                    (Reduce::Min, Ty::F32) => Reduce::MinF,
                    (Reduce::Max, Ty::F32) => Reduce::MaxF,
                    (_, Ty::F32) => return Ok(false),
                    (op, _) => op,
                };
                self.class = Class::Warp;
                self.arity(3, 3)?;
                let (a, b) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?);
                let d = self.dst(0, Ty::B32)?;
                self.emit(Inst {
                    d,
                    a,
                    b,
                    kind: Kind::Redux { op, signed: ty.signed(), absolute, nan },
                    ..self.blank()
                })?;
                Ok(true)
            }
            "activemask" => {
                self.mods.ty();
                self.class = Class::Warp;
                self.arity(1, 1)?;
                let d = self.dst(0, Ty::B32)?;
                self.emit(Inst { d, kind: Kind::ActiveMask, ..self.blank() })?;
                Ok(true)
            }
            "elect" => {
                self.mods.take("sync");
                self.class = Class::Warp;
                self.arity(2, 2)?;
                let b = self.src(1, Ty::B32)?;
                let Operand::Pair(d, p) = self.operand(0)? else {
                    return self.fail("expected `d|p`");
                };
                let d = if **d == Operand::Sink { NONE } else { self.dst_as(d, Ty::B32)? };
                let pred = self.pred_dst(p)?;
                self.emit(Inst { d, b, kind: Kind::Elect { pred }, ..self.blank() })?;
                Ok(true)
            }
            "nanosleep" => {
                self.mods.ty();
                self.class = Class::Control;
                self.emit(Inst { kind: Kind::Yield, ..self.blank() })?;
                Ok(true)
            }
            "griddepcontrol" | "setmaxnreg" | "pmevent" => {
                self.forget(&["launch_dependents", "wait", "inc", "dec", "sync", "aligned", "u32", "mask"]);
                self.class = Class::Control;
                self.emit(Inst { kind: Kind::Nop, ..self.blank() })?;
                Ok(true)
            }
            "mbarrier" => self.mbarrier(),
            "cp" => self.copy_async(),
            "mapa" | "getctarank" => self.cluster(op),
            _ => Ok(false),
        }
    }

    /// With one block in a cluster, an address maps to itself and every rank is 0.
    fn cluster(&mut self, op: &str) -> Result<bool> {
        self.mods.find(place);
        let Some(ty) = self.mods.ty() else {
            return Ok(false);
        };
        let a = self.src(1, ty)?;
        if op == "mapa" {
            self.arity(3, 3)?;
            let d = self.dst(0, ty)?;
            let alu = if ty.bytes() == 8 { crate::lanes::op1(|a: u64| a) } else { crate::lanes::op1(|a: u32| a) };
            self.alu(alu, d, &[a], 0)?;
        } else {
            self.arity(2, 2)?;
            let (zero, d) = (self.constant(1, 0)?, self.dst(0, Ty::U32)?);
            self.alu(crate::lanes::op1(|a: u32| a), d, &[zero], 0)?;
        }
        Ok(true)
    }

    fn bar(&mut self, op: &str) -> Result<bool> {
        self.class = Class::Barrier;
        if self.mods.take("warp") {
            self.mods.take("sync");
            self.arity(1, 1)?;
            let b = self.src(0, Ty::B32)?;
            self.emit(Inst { b, kind: Kind::WarpBar, ..self.blank() })?;
            return Ok(true);
        }
        self.mods.take("cta");
        let aligned = self.mods.take("aligned") || op == "bar";
        if self.mods.take("cluster") {
            // The cluster's barrier is one more barrier of the only block: its wait is where threads meet.
            let arrive = self.mods.take("arrive");
            let wait = self.mods.take("wait");
            self.forget(&["release", "acquire", "relaxed"]);
            if arrive == wait {
                return Ok(false);
            }
            let bar =
                Bar { id: NONE, count: NONE, arrive_only: arrive, aligned, reduce: 0, d: NONE, source: (NONE, false) };
            let kind = if arrive { Kind::Fence { proxy: false, wide: false } } else { Kind::Bar(Box::new(bar)) };
            self.emit(Inst { kind, ..self.blank() })?;
            return Ok(true);
        }
        let (sync, arrive, red) = (self.mods.take("sync"), self.mods.take("arrive"), self.mods.take("red"));
        if usize::from(sync) + usize::from(arrive) + usize::from(red) != 1 {
            return Ok(false);
        }
        if !red {
            self.arity(1, 2)?;
            let id = self.src(0, Ty::U32)?;
            let count = if self.count() == 2 { self.src(1, Ty::U32)? } else { NONE };
            if arrive && count == NONE {
                return self.fail("an arrival needs the number of threads");
            }
            let bar = Bar { id, count, arrive_only: arrive, aligned, reduce: 0, d: NONE, source: (NONE, false) };
            self.emit(Inst { kind: Kind::Bar(Box::new(bar)), ..self.blank() })?;
            return Ok(true);
        }
        let reduce = self.mods.find(|m| match m {
            "popc" => Some(1),
            "and" => Some(2),
            "or" => Some(3),
            _ => None,
        });
        let (Some(reduce), Some(_)) = (reduce, self.mods.ty()) else {
            return Ok(false);
        };
        self.arity(3, 4)?;
        let id = self.src(1, Ty::U32)?;
        let count = if self.count() == 4 { self.src(2, Ty::U32)? } else { NONE };
        let o = self.operand(self.count() - 1)?;
        let source = self.pred(o)?;
        let o = self.operand(0)?;
        let d = if reduce == 1 { self.dst(0, Ty::U32)? } else { self.pred_dst(o)? };
        let bar = Bar { id, count, arrive_only: false, aligned, reduce, d, source };
        self.emit(Inst { kind: Kind::Bar(Box::new(bar)), ..self.blank() })?;
        Ok(true)
    }

    fn shfl(&mut self) -> Result<bool> {
        if !self.mods.take("sync") {
            return self.fail("shfl without .sync does not exist for these targets");
        }
        let mode = self.mods.find(|m| {
            Some(match m {
                "up" => Shuffle::Up,
                "down" => Shuffle::Down,
                "bfly" => Shuffle::Bfly,
                "idx" => Shuffle::Idx,
                _ => return None,
            })
        });
        let (Some(mode), Some(Ty::B32)) = (mode, self.mods.ty()) else {
            return Ok(false);
        };
        self.class = Class::Warp;
        self.arity(5, 5)?;
        let (a, b, c) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::B32)?);
        let mask = self.src(4, Ty::B32)?;
        let (d, pred) = match self.operand(0)? {
            Operand::Pair(d, p) => (self.dst_as(d, Ty::B32)?, self.pred_dst(p)?),
            d => (self.dst_as(d, Ty::B32)?, NONE),
        };
        self.emit(Inst { d, a, b: mask, c, e: b, kind: Kind::Shuffle { mode, pred }, ..self.blank() })?;
        Ok(true)
    }

    fn mbarrier(&mut self) -> Result<bool> {
        self.class = Class::Barrier;
        let op = self.mods.find(|m| {
            Some(match m {
                "init" => MbarOp::Init,
                "inval" => MbarOp::Inval,
                "arrive" => MbarOp::Arrive,
                "arrive_drop" => MbarOp::ArriveDrop,
                "expect_tx" => MbarOp::ExpectTx,
                "complete_tx" => MbarOp::CompleteTx,
                "test_wait" => MbarOp::Test,
                "try_wait" => MbarOp::Try,
                "pending_count" => MbarOp::Pending,
                _ => return None,
            })
        });
        let Some(op) = op else { return Ok(false) };
        let expect = self.mods.take("expect_tx");
        let parity = self.mods.take("parity");
        self.mods.take("noComplete");
        self.forget(&["release", "acquire", "relaxed", "cta", "cluster"]);
        let place = self.mods.find(place).unwrap_or(Place::Generic);
        if self.mods.ty() != Some(Ty::B64) && !matches!(op, MbarOp::ExpectTx | MbarOp::CompleteTx) {
            return Ok(false);
        }
        let none = Addr { reg: NONE, wide: true, offset: 0 };
        let mut m = Mbar { op, place, address: none, d: NONE, count: NONE, tx: NONE, parity };
        match op {
            MbarOp::Init | MbarOp::Inval | MbarOp::ExpectTx | MbarOp::CompleteTx => {
                let n = if op == MbarOp::Inval { 1 } else { 2 };
                self.arity(n, n)?;
                let o = self.operand(0)?;
                m.address = self.address(o)?;
                if n == 2 {
                    m.count = self.src(1, Ty::U32)?;
                }
            }
            MbarOp::Arrive | MbarOp::ArriveDrop => {
                self.arity(1, 3)?;
                // Without a destination the address comes first.
                let first = usize::from(!matches!(self.operand(0)?, Operand::Address { .. }));
                if first == 1 && *self.operand(0)? != Operand::Sink {
                    m.d = self.dst(0, Ty::B64)?;
                }
                let o = self.operand(first)?;
                m.address = self.address(o)?;
                if self.count() > first + 1 {
                    let r = self.src(first + 1, Ty::U32)?;
                    if expect {
                        m.tx = r;
                    } else {
                        m.count = r;
                    }
                }
            }
            MbarOp::Test | MbarOp::Try => {
                // `try_wait` may end in a time limit.
                self.arity(3, 4)?;
                let o = self.operand(0)?;
                m.d = self.pred_dst(o)?;
                let o = self.operand(1)?;
                m.address = self.address(o)?;
                m.count = self.src(2, if parity { Ty::U32 } else { Ty::B64 })?;
            }
            MbarOp::Pending => {
                self.arity(2, 2)?;
                m.d = self.dst(0, Ty::U32)?;
                m.count = self.src(1, Ty::B64)?;
            }
        }
        self.emit(Inst { kind: Kind::Mbar(Box::new(m)), ..self.blank() })?;
        Ok(true)
    }

    fn copy_async(&mut self) -> Result<bool> {
        self.class = Class::Async;
        if self.mods.take("reduce") {
            self.mods.take("async");
            self.mods.take("bulk");
            return self.bulk(true);
        }
        if !self.mods.take("async") {
            return Ok(false);
        }
        if self.mods.take("bulk") {
            return self.bulk(false);
        }
        let kind = if self.mods.take("commit_group") {
            self.arity(0, 0)?;
            Kind::CpCommit
        } else if self.mods.take("wait_all") {
            self.arity(0, 0)?;
            Kind::CpWaitAll
        } else if self.mods.take("wait_group") {
            self.arity(1, 1)?;
            match self.operand(0)? {
                Operand::Int(n @ 0..=0xffff) => Kind::CpWait(*n as u32),
                _ => return self.fail("expected the number of groups"),
            }
        } else if self.mods.take("mbarrier") {
            if !self.mods.take("arrive") {
                return Ok(false);
            }
            let no_increment = self.mods.take("noinc");
            let place = self.mods.find(place).unwrap_or(Place::Generic);
            self.mods.ty();
            self.arity(1, 1)?;
            let o = self.operand(0)?;
            Kind::CpMbarArrive { address: self.address(o)?, place, no_increment }
        } else {
            let (ca, cg) = (self.mods.take("ca"), self.mods.take("cg"));
            self.mods.hints();
            let shared = self.mods.any(&["shared", "shared::cta"]);
            if ca == cg || !shared || !self.mods.take("global") {
                return Ok(false);
            }
            self.arity(3, 5)?;
            let (d, s) = (self.operand(0)?, self.operand(1)?);
            let (dst, src) = (self.address(d)?, self.address(s)?);
            let bytes = match self.operand(2)? {
                Operand::Int(n @ (4 | 8)) if ca => *n as u32,
                Operand::Int(16) => 16,
                _ => return self.fail("the size must be 16 (or 4 or 8 with .ca)"),
            };
            let (mut src_bytes, mut ignore) = (NONE, (NONE, false));
            if let Some(o) = self.instr.operands.get(3) {
                let is_pred = match o {
                    Operand::Not(_) => true,
                    Operand::Name(n) => self.register(n)?.is_some_and(|r| r.ty == Ty::Pred),
                    _ => false,
                };
                let is_policy = match o {
                    Operand::Name(n) => self.register(n)?.is_some_and(|r| r.words == 2),
                    _ => false,
                };
                if is_pred {
                    ignore = self.pred(o)?;
                } else if !is_policy {
                    src_bytes = self.value(o, Ty::U32)?;
                }
            }
            Kind::CpAsync(Box::new(CpAsync { dst, src, bytes, src_bytes, ignore }))
        };
        self.emit(Inst { kind, ..self.blank() })?;
        Ok(true)
    }
}
