//! Declarations of variables, registers and parameters, with their initial values.

use super::ast::*;
use super::lexer::Tok;
use super::parser::{Parser, Result};

impl Parser<'_> {
    pub(super) fn params(&mut self) -> Result<Vec<Var>> {
        self.expect(b'(')?;
        let mut out = Vec::new();
        while !self.eat(b')') {
            self.declaration(false, &mut out, true)?;
            if !self.eat(b',') && self.peek() != Tok::Punct(b')') {
                return self.fail("expected `,` or `)` after a parameter");
            }
        }
        Ok(out)
    }

    /// Variables up to and with the semicolon.
    pub(super) fn var(&mut self, external: bool, out: &mut Vec<Var>) -> Result<()> {
        self.declaration(external, out, false)?;
        self.expect(b';')
    }

    /// `.space .align N .type name[..] = init, name ...`; of a parameter list, one.
    fn declaration(&mut self, external: bool, out: &mut Vec<Var>, single: bool) -> Result<()> {
        let space = match self.next() {
            Tok::Dot("reg") => Space::Reg,
            Tok::Dot("global") => Space::Global,
            Tok::Dot("const") => Space::Const,
            Tok::Dot("shared") => Space::Shared,
            Tok::Dot("local") => Space::Local,
            Tok::Dot("param") => Space::Param,
            _ => {
                self.i -= 1;
                return self.fail("expected a state space such as `.reg` or `.param`");
            }
        };
        let (mut align, mut ty, mut vector) = (0u32, None, 1u64);
        while let Tok::Dot(d) = self.peek() {
            self.i += 1;
            match d {
                "align" => {
                    let v = self.integer()?;
                    if !v.is_power_of_two() || v > 4096 {
                        return self.fail("an alignment is a power of two up to 4096");
                    }
                    // `.ptr .global .align 1` speaks of what a parameter points to.
                    if ty.is_none() {
                        align = v as u32;
                    }
                }
                "v2" if space != Space::Reg => vector = 2,
                "v4" if space != Space::Reg => vector = 4,
                "ptr" | "global" | "shared" | "const" | "local" | "param" if ty.is_some() => {}
                "attribute" => while !matches!(self.next(), Tok::Punct(b')') | Tok::End) {},
                _ => match Ty::parse(d) {
                    Some(t) => ty = Some(t),
                    None => {
                        self.i -= 1;
                        return self.fail("this is not a type that variables can have");
                    }
                },
            }
        }
        let Some(ty) = ty else {
            return self.fail("this variable has no type");
        };
        loop {
            let line = self.line();
            // Prototypes may leave the name out.
            let name = match self.peek() {
                Tok::Word(w) => {
                    self.i += 1;
                    w.to_owned()
                }
                _ if single => String::new(),
                _ => return self.fail("expected the name of a variable"),
            };
            let mut v = Var {
                line,
                space,
                name,
                ty,
                align: align.max(ty.bytes() * vector as u32),
                count: vector,
                is_array: vector > 1,
                external,
                family: None,
                init: Vec::new(),
            };
            if space == Space::Param || align > 0 {
                v.align = if align > 0 { align } else { ty.bytes() };
            }
            if self.eat(b'<') {
                v.family = Some(self.integer()?);
                self.expect(b'>')?;
            }
            while self.eat(b'[') {
                v.is_array = true;
                let n = if self.peek() == Tok::Punct(b']') { 0 } else { self.integer()? };
                v.count = match v.count.checked_mul(n) {
                    Some(c) if c.checked_mul(16).is_some() => c,
                    _ => return self.fail("this array is too large"),
                };
                self.expect(b']')?;
            }
            if self.eat(b'=') {
                self.initialiser(&mut v)?;
            }
            out.push(v);
            if single || !self.eat(b',') {
                return Ok(());
            }
        }
    }

    fn initialiser(&mut self, v: &mut Var) -> Result<()> {
        let mut depth = 0u32;
        loop {
            if self.eat(b'{') {
                depth += 1;
                continue;
            }
            if depth > 0 && self.eat(b'}') {
                depth -= 1;
            } else {
                let item = self.init_value()?;
                v.init.push(item);
            }
            while depth > 0 && self.eat(b'}') {
                depth -= 1;
            }
            if depth == 0 {
                break;
            }
            self.expect(b',')?;
        }
        if v.is_array && v.count == 0 {
            v.count = v.init.len() as u64;
        }
        if v.init.len() as u64 > v.count {
            return self.fail("there are more initial values than elements");
        }
        Ok(())
    }

    fn init_value(&mut self) -> Result<Init> {
        let negative = self.eat(b'-');
        Ok(match self.next() {
            Tok::Int(i) => Init::Int(if negative { -i128::from(i) } else { i128::from(i) }),
            Tok::F32(b) => Init::F32(b ^ (u32::from(negative) << 31)),
            Tok::F64(b) => Init::F64(b ^ (u64::from(negative) << 63)),
            Tok::Word("generic") => {
                self.expect(b'(')?;
                let name = self.word()?.to_owned();
                let mut offset = self.offset()?;
                self.expect(b')')?;
                offset = offset.wrapping_add(self.offset()?);
                Init::Address { name, offset }
            }
            Tok::Word(w) => Init::Address { name: w.to_owned(), offset: self.offset()? },
            _ => {
                self.i -= 1;
                return self.fail("this initial value is not supported");
            }
        })
    }

    /// `+4`, `-4`, `+-4` or nothing.
    pub(super) fn offset(&mut self) -> Result<i64> {
        let negative = if self.eat(b'+') {
            self.eat(b'-')
        } else if self.eat(b'-') {
            true
        } else {
            return Ok(0);
        };
        let v = self.integer()? as i64;
        Ok(if negative { v.wrapping_neg() } else { v })
    }
}
