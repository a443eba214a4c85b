//! Bodies of functions: statements, instructions and operands.

use super::ast::*;
use super::lexer::Tok;
use super::parser::{Parser, Result};

impl Parser<'_> {
    pub(super) fn body(&mut self) -> Result<Vec<Stmt>> {
        let (mut out, mut depth) = (Vec::new(), 1u32);
        loop {
            let line = self.line();
            match self.peek() {
                Tok::End => return self.fail("the function does not end"),
                Tok::Punct(b';') => self.i += 1,
                Tok::Punct(b'{') => {
                    self.i += 1;
                    depth += 1;
                    if depth > 1000 {
                        return self.fail("blocks are nested too deeply");
                    }
                    out.push(Stmt::Open);
                }
                Tok::Punct(b'}') => {
                    self.i += 1;
                    depth -= 1;
                    if depth == 0 {
                        return Ok(out);
                    }
                    out.push(Stmt::Close);
                }
                Tok::Dot("loc" | "file") => self.skip_line(),
                Tok::Dot("section") => self.skip_braces()?,
                Tok::Dot("pragma") => self.skip_to_semicolon(),
                Tok::Dot("maxnreg" | "local_maxnreg") => self.skip_to_semicolon(),
                Tok::Dot(_) => {
                    let mut vars = Vec::new();
                    self.var(false, &mut vars)?;
                    out.extend(vars.into_iter().map(Stmt::Var));
                }
                Tok::Word(w) if self.tokens[self.i + 1].tok == Tok::Punct(b':') => {
                    self.i += 2;
                    match self.peek() {
                        Tok::Dot("branchtargets" | "calltargets") => {
                            self.i += 1;
                            let mut labels = vec![self.word()?.to_owned()];
                            while self.eat(b',') {
                                labels.push(self.word()?.to_owned());
                            }
                            self.expect(b';')?;
                            out.push(Stmt::Targets { name: w.to_owned(), labels });
                        }
                        Tok::Dot("callprototype") => {
                            self.i += 1;
                            let returns = if self.peek() == Tok::Punct(b'(') { self.params()? } else { Vec::new() };
                            self.word()?;
                            let params = if self.peek() == Tok::Punct(b'(') { self.params()? } else { Vec::new() };
                            self.attributes(&mut Attributes::default())?;
                            self.expect(b';')?;
                            out.push(Stmt::Prototype { name: w.to_owned(), returns, params });
                        }
                        _ => out.push(Stmt::Label(w.to_owned(), line)),
                    }
                }
                Tok::Word(_) | Tok::Punct(b'@') => {
                    let instr = self.instr()?;
                    out.push(Stmt::Instr(instr));
                }
                _ => return self.fail("expected an instruction"),
            }
        }
    }

    fn instr(&mut self) -> Result<Instr> {
        let (line, start) = (self.line(), self.tokens[self.i].start);
        let guard = match self.eat(b'@') {
            true => {
                let negated = self.eat(b'!');
                Some((self.word()?.to_owned(), negated))
            }
            false => None,
        };
        let opcode = self.word()?.to_owned();
        let mut mods = Vec::new();
        while let Tok::Dot(m) = self.peek() {
            self.i += 1;
            mods.push(m.to_owned());
        }
        let mut operands = Vec::new();
        while self.peek() != Tok::Punct(b';') {
            operands.push(self.operand(0)?);
            if self.peek() != Tok::Punct(b';') {
                self.expect(b',')?;
            }
        }
        let end = self.tokens[self.i].start;
        self.i += 1;
        let text = self.text[start..end].split_whitespace().collect::<Vec<_>>().join(" ");
        Ok(Instr { line, text, guard, opcode, mods, operands })
    }

    fn operand(&mut self, depth: u32) -> Result<Operand> {
        let first = self.simple(depth)?;
        if self.eat(b'|') {
            let second = self.simple(depth)?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn list(&mut self, close: u8, depth: u32) -> Result<Vec<Operand>> {
        if depth > 2 {
            return self.fail("operands are nested too deeply");
        }
        let mut out = Vec::new();
        while !self.eat(close) {
            out.push(self.operand(depth + 1)?);
            if !self.eat(b',') && self.peek() != Tok::Punct(close) {
                return self.fail(format!("expected `,` or `{}`", close as char));
            }
        }
        Ok(out)
    }

    fn simple(&mut self, depth: u32) -> Result<Operand> {
        let op = match self.next() {
            Tok::Word("_") => Operand::Sink,
            Tok::Word(w) => match self.peek() {
                Tok::Punct(b'+' | b'-') => {
                    let offset = self.offset()?;
                    Operand::Sum(w.to_owned(), offset)
                }
                _ => Operand::Name(w.to_owned()),
            },
            Tok::Int(v) => Operand::Int(i128::from(v)),
            Tok::F32(v) => Operand::F32(v),
            Tok::F64(v) => Operand::F64(v),
            Tok::Punct(b'!') => Operand::Not(self.word()?.to_owned()),
            Tok::Punct(sign @ (b'-' | b'~' | b'+')) => match (self.next(), sign) {
                (Tok::Int(v), b'-') => Operand::Int(-i128::from(v)),
                (Tok::Int(v), b'~') => Operand::Int(i128::from(!v as i64)),
                (Tok::Int(v), _) => Operand::Int(i128::from(v)),
                (Tok::F32(v), b'-') => Operand::F32(v ^ (1 << 31)),
                (Tok::F64(v), b'-') => Operand::F64(v ^ (1 << 63)),
                _ => {
                    self.i -= 1;
                    return self.fail("expected a number after the sign");
                }
            },
            Tok::Punct(b'{') => Operand::Vector(self.list(b'}', depth)?),
            Tok::Punct(b'(') => Operand::List(self.list(b')', depth)?),
            Tok::Punct(b'[') => {
                if depth > 2 {
                    return self.fail("operands are nested too deeply");
                }
                let base = self.simple(depth + 1)?;
                let (base, mut offset) = match base {
                    Operand::Sum(name, offset) => (Operand::Name(name), offset),
                    other => (other, 0),
                };
                offset = offset.wrapping_add(self.offset()?);
                let mut more = Vec::new();
                while self.eat(b',') {
                    more.push(self.operand(depth + 1)?);
                }
                self.expect(b']')?;
                Operand::Address { base: Box::new(base), offset, more }
            }
            _ => {
                self.i = self.i.saturating_sub(1);
                return self.fail("this is not an operand");
            }
        };
        Ok(op)
    }
}
