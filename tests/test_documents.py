"Files, folders, patterns, addresses and stdin as contexts: what is read, what is left out, and what is said of bad input"
import io, os, random, re, shutil, socket, subprocess, sys, tempfile, threading, time, zipfile, zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from rlm.documents import *
from rlm.repl import open_repl
from rlm.usage import RLMError

def write(folder, files):
    "Files by path, text or bytes"
    for name, content in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder

def refused(names, *words, **kw):
    "The one-line error that `load` raises, which holds the words"
    with pytest.raises(DocumentError) as e: load(names, **kw)
    said = str(e.value)
    assert isinstance(e.value, RLMError) and '\n' not in said and len(said) < 700
    for word in words: assert word in said, said
    return said

def names(docs, folder): return [os.path.relpath(o.name, folder) for o in docs.sources]
def left_out(docs, folder): return {os.path.relpath(name, folder): why for name, why in docs.skipped}

# One text and its places ---------------------------------------------------------------------------------------------
def test_one_file_is_its_own_text(tmp_path):
    path = tmp_path/'a.txt'
    path.write_bytes('\ufeffGrüße\r\nzwei\n'.encode())
    docs = load(path)
    assert docs.context == docs.text == 'Grüße\nzwei\n' and docs.where(7) == (str(path), 2)

def test_several_files_have_a_line_with_their_name_each(tmp_path):
    write(tmp_path, {'a.txt': 'one\ntwo\n', 'b.txt': 'three'})
    docs = load([tmp_path/'b.txt', tmp_path/'a.txt'])
    assert docs.text == f'==> {tmp_path}/b.txt <==\nthree\n==> {tmp_path}/a.txt <==\none\ntwo\n'
    assert docs.where(docs.text.find('two')) == (f'{tmp_path}/a.txt', 2)

def test_every_position_has_its_line(tmp_path):
    "Against the files themselves"
    write(tmp_path, {f'd{i}/f{j}.txt': ''.join(f'{i}.{j}.{k} é\n' for k in range(7)) for i in range(3) for j in range(4)})
    docs = load(tmp_path)
    assert len(docs.sources) == 12
    for s in docs.sources:
        lines = Path(s.name).read_text(encoding='utf-8').splitlines()
        for k, line in enumerate(lines, 1): assert docs.where(docs.text.index(line)) == (s.name, k)

def test_names_of_any_kind(tmp_path):
    odd = ['a b.txt', "it's.txt", '[1].txt', 'star*.txt', '-n.txt', 'né.txt', 'new\nline.txt', '\x1b[2J.txt', '日本.txt', '#x', '~', 'a%20b.txt']
    write(tmp_path, {name: f'this is {i:02}' for i, name in enumerate(odd)})
    for i, name in enumerate(odd): assert load(tmp_path/name).text == f'this is {i:02}'
    docs = load(tmp_path)
    assert len(docs.sources) == len(odd) and docs.text.count('\n==> ') == len(odd)-1
    assert '\x1b' not in docs.text and r'new\nline.txt <==' in docs.text

def test_names_that_are_no_unicode(tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b'/caf\xe9.txt')
    Path(name).write_text('x')
    write(tmp_path, {'b.txt': 'y'})
    docs = load(tmp_path)
    docs.text.encode()
    assert len(docs.sources) == 2 and load(name).text == 'x'

def test_nothing_is_read_twice(tmp_path, monkeypatch):
    write(tmp_path, {'a.txt': 'one', 'b.txt': 'two'})
    os.symlink(tmp_path/'a.txt', tmp_path/'c.txt')
    monkeypatch.chdir(tmp_path)
    assert [o.name for o in load(['a.txt', './a.txt', 'c.txt', '*.txt', '.', tmp_path/'b.txt']).sources] == ['a.txt', 'b.txt']

# Folders -------------------------------------------------------------------------------------------------------------
tree = {'b.md': '# b', 'a.py': 'import os', 'src/m.py': 'x', 'src/deep/n.py': 'y', 'logo.png': b'\x89PNG\r\n\x1a\n\0\0', 'empty': '', 'blank.txt': ' \n', 'latin.txt': b'caf\xe9',
    '.env': 'SECRET=1', '.git/config': 'x', 'node_modules/x.js': 'x', 'src/__pycache__/m.pyc': b'\0'}

def test_a_folder_is_read_in_order_and_what_is_left_out_is_told(tmp_path):
    docs = load(write(tmp_path, tree))
    assert names(docs, tmp_path) == ['a.py', 'b.md', 'src/m.py', 'src/deep/n.py']
    out = left_out(docs, tmp_path)
    assert {k: out[k] for k in ('.env', '.git', 'node_modules', 'src/__pycache__', 'empty', 'blank.txt')} == {'.env': 'hidden', '.git': 'hidden',
        'node_modules': 'filled by other programs', 'src/__pycache__': 'filled by other programs', 'empty': 'is empty', 'blank.txt': 'is empty'}
    assert 'looks like an image' in out['logo.png'] and '--encoding' in out['latin.txt'] and len(out) == 8
    assert str(docs).startswith('4 documents, ') and '.env' in str(docs) and 'SECRET' not in docs.text
    assert load(tmp_path/'.env').text == 'SECRET=1'

ignored = {'.gitignore': '*.log\n/build/\n!keep.log\n# note\n\nsrc/gen-*.py\ndocs/**/tmp\n\\#a\n[^a]1\n\\p\\ \nq/**  \r\n', '#a': 'x', 'b1': 'x', 'a1': '12', 'p ': 'x', 'q/r/s': 'x', 'p': '13', 'a.log': '1', 'keep.log': '2', 'x/b.log': '3', 'build/o.txt': '4', 'x/build/p.txt': '5', 'src/gen-1.py': '6',
    'src/main.py': '7', 'docs/a/b/tmp/q.txt': '8', 'sub/.gitignore': 'r.txt\n!a.log\n', 'sub/r.txt': '9', 'sub/a.log': '10', 'r.txt': '11'}

def test_gitignore_as_git_reads_it(tmp_path):
    write(tmp_path, ignored)
    mine = set(names(load(tmp_path), tmp_path))
    assert mine == {'keep.log', 'x/build/p.txt', 'src/main.py', 'sub/a.log', 'r.txt', 'a1', 'p'}
    if not shutil.which('git'): pytest.skip('no git to compare with')
    subprocess.run(['git', 'init', '-q', str(tmp_path)], check=True)
    git = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert mine == {o for o in git if not o.endswith('.gitignore')}
    assert names(load(tmp_path/'sub'), tmp_path) == ['sub/a.log']
    assert names(load(tmp_path/'src'), tmp_path) == ['src/main.py']

def test_links_lead_neither_out_nor_round(tmp_path, monkeypatch):
    write(tmp_path, {'in/a.txt': 'a', 'in/b/c.txt': 'c', 'secret.txt': 'secret'})
    os.symlink('../secret.txt', tmp_path/'in/out.txt')
    os.symlink('..', tmp_path/'in/b/up')
    os.symlink('.', tmp_path/'in/round')
    os.symlink('b/c.txt', tmp_path/'in/same.txt')
    os.symlink('nowhere', tmp_path/'in/broken')
    os.symlink('loop2', tmp_path/'in/loop1')
    os.symlink('loop1', tmp_path/'in/loop2')
    os.mkfifo(tmp_path/'in/pipe')
    docs = load(tmp_path/'in')
    assert names(docs, tmp_path/'in') == ['a.txt', 'same.txt'] and 'secret' not in docs.text
    out = left_out(docs, tmp_path/'in')
    assert (out['out.txt'], out['b/up'], out['round'], out['broken'], out['loop1'], out['pipe']) == ('a link out of the folder', *['a link to a folder']*2, *['not a file']*3)
    monkeypatch.chdir(tmp_path/'in')
    t = time.monotonic()
    assert [o.name for o in load('**/*.txt').sources] == ['a.txt', 'out.txt', 'same.txt']
    assert time.monotonic() - t < 10
    refused('loop1', 'symbolic links')
    refused('broken', 'link to a file that is not there')

def test_ten_thousand_folders_deep_and_wide(tmp_path):
    at = tmp_path
    for i in range(300): at = at/'d'
    write(at, {'x.txt': 'deep'})
    write(tmp_path, {f'w/{i}.txt': 'wide' for i in range(2000)})
    docs = load(tmp_path)
    assert len(docs.sources) == 2001 and docs.sources[0].name.endswith('/d/x.txt') and docs.text.endswith('wide')

def test_folders_with_nothing_in_them(tmp_path):
    refused(tmp_path, 'has nothing to read', 'name another folder')
    refused(write(tmp_path, {'.hidden': 'x', 'y.png': b'\0'}), 'has nothing to read', '.hidden', 'y.png')

def test_patterns(tmp_path, monkeypatch):
    write(tmp_path, {'a.py': '1', 'b.py': '2', 'x/c.py': '3', 'x/y/d.py': '4', 'x/y/d.txt': '5', '.h/e.py': '6', 'node_modules/f.py': '7', 'z.py/g.txt': '8', 'l.png': b'\0'})
    monkeypatch.chdir(tmp_path)
    def got(pattern): return [o.name for o in load(pattern).sources]
    assert got('*.py') == ['a.py', 'b.py']
    assert got('**/*.py') == ['a.py', 'b.py', 'x/c.py', 'x/y/d.py']
    assert got('x/**') == ['x/c.py', 'x/y/d.py', 'x/y/d.txt']
    assert got('[ab].py') == ['a.py', 'b.py'] and got('?.py') == ['a.py', 'b.py'] and got('./?.py') == ['./a.py', './b.py']
    assert got(f'{tmp_path}/x/*/*.txt') == [f'{tmp_path}/x/y/d.txt'] and got('.h/*') == ['.h/e.py'] and got('x/../*.py') == ['x/../a.py', 'x/../b.py']
    assert got('x*') == ['x/c.py', 'x/y/d.py', 'x/y/d.txt']
    assert left_out(load('*'), tmp_path)['l.png'] == 'is not a text file'
    refused('*.rs', '*.rs', 'no file matches')
    refused('*.png', 'has nothing to read', 'l.png')
    refused('nowhere/*.py', 'no file matches')

# Bad input -----------------------------------------------------------------------------------------------------------
bad = [(b'abc\0def', 'is not a text file', {}), (b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR', 'image', {}), (b'PK\x03\x04\x14\0junk', 'damaged or unusual DOCX', {}), (b'\x1f\x8b\x08\0' + b'\xff'*99, 'compressed', {}), (b'', 'is empty', {}), (b' \n\t\n', 'is empty', {}),
    (b'caf\xe9', 'is not utf-8 text (byte 3); name its encoding with --encoding', {}), (b'caf\xe9', 'is not ascii text', dict(encoding='ascii')), (b'x', 'no such encoding: utf-99', dict(encoding='utf-99')),
    (b'x', 'no such encoding: rot13', dict(encoding='rot13')), (b'x', 'no such encoding', dict(encoding='a\0b')), (b'\xff\xfea', 'is not utf-16 text', {}), (b'\xd0\xcf\x11\xe0\xa1\xb1\0', 'save it as DOCX', {}),
    ('Grüße aus Rom'.encode('utf-16-le'), 'if it is utf-16-le, name that with --encoding', {}), ('Grüße aus Rom'.encode('utf-16-be'), 'utf-16-be', {}), (b'a+2AA-', 'is not utf-7 text', dict(encoding='utf-7')),
    (b'\\ud800', 'is not unicode_escape text', dict(encoding='unicode_escape'))]

@pytest.mark.parametrize('data,words,kw', bad)
def test_files_that_are_no_text(tmp_path, data, words, kw):
    path = tmp_path/'file'
    path.write_bytes(data)
    refused(path, words, **kw)

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32', 'latin-1', 'utf-16-le', 'cp1252', 'utf_16_be'])
def test_encodings(tmp_path, encoding):
    path = tmp_path/'a.csv'
    path.write_bytes('name;größe\nä;1\n'.encode(encoding))
    assert load(path, encoding=None if encoding in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-32') else encoding).text == 'name;größe\nä;1\n'

def test_names_of_nothing(tmp_path):
    refused(tmp_path/'none.txt', 'none.txt: no such file')
    refused(tmp_path/'none'/'x.txt', 'no such file')
    refused('a\0b', r'a\x00b: no such file')
    refused('example.com/page', 'no such file', 'https://example.com/page')
    refused('', 'is no name')
    refused('x'*5000, 'File name too long')
    refused([], 'nothing is named')

def test_devices_and_pipes(tmp_path):
    refused('/dev/zero', 'not a text file')
    refused('/dev/null', 'is empty')
    os.mkfifo(tmp_path/'pipe')
    threading.Thread(target=lambda: (tmp_path/'pipe').write_text('through a pipe'), daemon=True).start()
    assert load(tmp_path/'pipe').text == 'through a pipe'
    s = socket.socket(socket.AF_UNIX)
    s.bind(str(tmp_path/'s'))
    refused(tmp_path/'s', 'No such device')
    s.close()

@contextmanager
def as_nobody():
    "Without the rights of root, if it is root"
    root = os.geteuid() == 0
    if root: os.seteuid(65534)
    try: yield
    finally:
        if root: os.seteuid(0)

def test_permission_denied():
    with tempfile.TemporaryDirectory() as d:
        folder = write(Path(d), {'a.txt': 'a', 'shut.txt': 'b', 'shut/c.txt': 'c'})
        folder.chmod(0o755)
        for o in 'shut.txt', 'shut': (folder/o).chmod(0)
        with as_nobody():
            for o in 'shut.txt', 'shut', 'shut/c.txt', 'shut/*.txt': refused(folder/o, 'Permission denied')
            docs = load(folder)
        assert names(docs, folder) == ['a.txt']
        assert set(left_out(docs, folder)) == {'shut.txt', 'shut'} and 'Permission denied' in str(docs)
        for o in 'shut.txt', 'shut': (folder/o).chmod(0o700)

def huge(path, size=5<<30, head=b'first line\nsecond line\n'):
    "A sparse file"
    with open(path, 'wb') as f:
        f.write(head * (200_000//len(head)))
        f.seek(size-9)
        f.write(b'\nthe end\n')
    return path

def peak(*cells):
    "Bytes of memory that a process of its own took at most, each cell a line of Python in it that may be refused a document, and what it printed"
    if not os.path.exists('/proc/self/status'): pytest.skip('tells the peak of memory on Linux only')
    code = 'import re\nfrom rlm.documents import *\n' + ''.join(f'try: {o}\nexcept DocumentError as e: print(e)\n' for o in cells) + "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    *said, kb = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.splitlines()
    return int(kb)*1024, said

def test_five_gigabytes_are_not_read_into_memory(tmp_path):
    path = huge(tmp_path/'big.log')
    most, said = peak(f'load({str(path)!r})', f"docs = load({str(path)!r}, repl='jail')", 'print(docs.where(11)[1], docs)', f"print(load([{str(path)!r}, {__file__!r}], repl='jail'))")
    assert most < 150<<20 and said[1] == '2 1 document, 5.0 GB, mapped' and 'ask about it alone' in said[2]
    refused(path, 'big.log is 5.0 GB', '--repl jail')
    docs = load(path, repl='jail')
    assert docs.context == path and docs.where(11) == (str(path), 2) and '5.0 GB' in str(docs)
    refused([path, write(tmp_path, {'b.txt': 'b'})/'b.txt'], 'ask about it alone', repl='jail')
    docs = load(tmp_path, repl='jail')
    assert names(docs, tmp_path) == ['b.txt'] and '5.0 GB' in left_out(docs, tmp_path)['big.log']
    for head, words in ((b'\0'*1000, 'not a text file'), (b'caf\xe9 '*1000, 'iconv'), (b'%PDF-1.7\n'*1000, 'too large for what reads PDF'), ('grüße'.encode('utf-16'), 'UTF-8')):
        for repl in 'jail', 'monty': refused(huge(tmp_path/'bad', head=head), words, repl=repl)

def test_a_mapped_file_in_a_repl(tmp_path):
    "The same limits at a hundredth of the size, and the text as a cell sees it"
    path = huge(tmp_path/'big.log', 50<<20)
    docs = load(path, repl='process', most=10<<20)
    with open_repl('process', docs.context) as repl:
        assert repl.run('context[:10]').value == "'first line'" and repl.run("len(context)").value == str(50<<20)
    assert load(path.rename(tmp_path/'small.log'), most=60<<20).where(11)[1] == 2

def test_a_limit_on_all_files_together(tmp_path):
    write(tmp_path, {f'{i}.txt': 'x'*600 for i in range(5)})
    assert len(load(tmp_path, most=3000).text) > 3000
    refused(tmp_path, '4.txt', 'name fewer files', most=2999)
    refused(tmp_path, 'has nothing to read', 'read into memory', most=599)

# HTML, DOCX, PDF -----------------------------------------------------------------------------------------------------
def test_html(tmp_path):
    write(tmp_path, {'a.html': '<!doctype html><meta charset=latin-1><h1>Gr\xfc\xdfe</h1>'.encode('latin-1'), 'b': '<html><body><p>one<p>two', 'c.htm': b'<p>caf\xe9 \x93x\x94', 'd.txt': '<html>stays</html>',
        'e.html': '<script>x</script>', 'f.html': b'<p>\0</p>', 'g.html': '<p>é'.encode('utf-16')})
    def text(name): return load(tmp_path/name).text
    assert [text(o) for o in ('a.html', 'b', 'c.htm', 'd.txt', 'g.html')] == ['# Grüße\n', 'one\ntwo\n', 'café “x”\n', '<html>stays</html>', 'é\n']
    refused(tmp_path/'e.html', 'is empty')
    refused(tmp_path/'f.html', 'not a text file')

hard = ['<b>x</b>', '<a href=x>', '<td>x', '<svg>', '<', '<!', '<a ', '&', '<a x="', "<a x='\"", '<script>', '<!--', '&#', '<title>', '</', '<pre>x\n', '<a =>']

def test_no_page_takes_longer_than_its_size():
    t = time.process_time()
    for o in hard: html_text(o*(400_000//len(o)))
    assert time.process_time() - t < 30

def a_docx():
    import docx
    d = docx.Document()
    d.add_heading('Lease', 0)
    d.add_heading('Terms', 2)
    p = d.add_paragraph('The rent is ')
    p.add_run('1,240 EUR').bold = True
    p.add_run('\ta month')
    d.add_paragraph('heating', style='List Bullet')
    table = d.add_table(2, 2)
    for cell, text in zip(table._cells, ('item', 'EUR', 'garage\nand cellar', '80')): cell.text = text
    d.add_paragraph('Grüße 🙂 <&>')
    d.sections[0].header.paragraphs[0].text = 'not in the text'
    out = io.BytesIO()
    d.save(out)
    return out.getvalue()

def test_docx_as_word_processors_write_it(tmp_path):
    write(tmp_path, {'lease.docx': a_docx(), 'renamed': a_docx()})
    assert load(tmp_path/'lease.docx').text == '# Lease\n## Terms\nThe rent is 1,240 EUR\ta month\n- heating\nitem | EUR\ngarage and cellar | 80\nGrüße 🙂 <&>\n'
    assert load(tmp_path/'renamed').text == load(tmp_path/'lease.docx').text

def zipped(parts):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in parts.items():
            with z.open(name, 'w') as f: f.writelines([data.encode()] if isinstance(data, str) else data)
    return out.getvalue()

def body(xml): return f'<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"><w:body>{xml}</w:body></w:document>'

def test_docx_changes_notes_and_boxes():
    xml = '''<w:p><w:r><w:t>kept</w:t></w:r><w:del><w:r><w:delText>gone</w:delText></w:r></w:del><w:ins><w:r><w:t xml:space="preserve"> new</w:t></w:r></w:ins><w:r><w:footnoteReference w:id="2"/></w:r>
        <w:moveFrom><w:r><w:t>moved</w:t></w:r></w:moveFrom><w:r><mc:AlternateContent><mc:Choice><w:t>!</w:t></mc:Choice><mc:Fallback><w:t>twice</w:t></mc:Fallback></mc:AlternateContent></w:r></w:p>
        <w:p><w:pPr><w:pStyle w:val="berschrift1"/></w:pPr><w:r><w:instrText>TOC</w:instrText><w:t>Titel</w:t></w:r></w:p>'''
    notes = '<w:footnote w:id="2"><w:p><w:r><w:t>a note</w:t></w:r></w:p></w:footnote>'
    styles = '<w:style w:styleId="berschrift1"><w:name w:val="heading 1"/></w:style>'
    parts = {'word/document.xml': body(xml), 'word/footnotes.xml': body(notes), 'word/styles.xml': body(styles)}
    assert docx_text('x', zipped(parts)) == 'kept new[^f2]!\n# Titel\n[^f2] a note\n'

laughs = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>' + body('<w:p><w:r><w:t>&b;</w:t></w:r></w:p>')

@pytest.mark.parametrize('make,words', [(lambda: a_docx()[:9000], 'damaged'), (lambda: a_docx().replace(b'word/document.xml', b'word/dXcument.xml', 1), 'damaged'), (lambda: zipped({'word/document.xml': 'no xml'}), 'damaged'),
    (lambda: zipped({'word/document.xml': laughs}), 'declares a document type'), (lambda: zipped({'word/document.xml': [b' '*(1<<20)]*200}), 'unpacks to 200.0 MB'), (lambda: zipped({'xl/workbook.xml': '<x/>'}), 'save the sheet as CSV'),
    (lambda: zipped({'word/document.xml': body('')}), 'is empty'), (lambda: b'PK\x03\x04', 'damaged')])
def test_docx_that_cannot_be_read(tmp_path, make, words):
    write(tmp_path, {'x.docx': make()})
    refused(tmp_path/'x.docx', 'x.docx', words)

def test_a_zip_bomb_that_lies_about_its_size(tmp_path):
    "The archive says that its part has ten bytes"
    head, tail = body('<w:p><w:r><w:t>|</w:t></w:r></w:p>').encode().split(b'|')
    data, size = zipped({'word/document.xml': [head, *[b'x'*(1<<20)]*300, tail]}), len(head + tail) + (300<<20)
    write(tmp_path, {'x.docx': data.replace(size.to_bytes(4, 'little'), (10).to_bytes(4, 'little'))})
    most, said = peak(f"load({str(tmp_path/'x.docx')!r})")
    assert most < 150<<20 and 'damaged' in said[0]

def a_pdf(*pages, damage=False):
    "A PDF of pages with a line of text each; None: a page without"
    streams = [b'' if o is None else b'BT /F1 12 Tf 72 700 Td (' + o.encode('latin-1') + b') Tj ET' for o in pages]
    n = len(pages)
    objects = [b'<< /Type /Catalog /Pages 2 0 R >>', b'<< /Type /Pages /Count %d /Kids [%s] >>' % (n, b' '.join(b'%d 0 R' % (4+2*i) for i in range(n))),
        b'<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>']
    for i, o in enumerate(streams):
        objects += [b'<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >> /Contents %d 0 R >>' % (5+2*i), b'<< /Length %d >>\nstream\n%s\nendstream' % (len(o), o)]
    out, places = b'%PDF-1.4\n', []
    for i, o in enumerate(objects, 1):
        places.append(len(out))
        out += b'%d 0 obj\n%s\nendobj\n' % (i, o)
    xref = b'xref\n0 %d\n0000000000 65535 f \n' % (len(objects)+1) + b''.join(b'%010d 00000 n \n' % o for o in places)
    return out + xref + b'trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n' % (len(objects)+1, len(out))

def locked(data, user, algorithm):
    import pypdf
    w, out = pypdf.PdfWriter(clone_from=pypdf.PdfReader(io.BytesIO(data))), io.BytesIO()
    w.encrypt(user, 'owner', algorithm=algorithm)
    w.write(out)
    return out.getvalue()

def test_pdf(tmp_path):
    pytest.importorskip('pypdf')
    write(tmp_path, {'m.pdf': a_pdf('Chapter one', None, 'The fee is 12 EUR'), 'no-name': a_pdf('by its bytes')})
    docs = load(tmp_path/'m.pdf')
    assert docs.text == '[page 1]\nChapter one\n[page 3]\nThe fee is 12 EUR\n'
    assert docs.skipped == [(str(tmp_path/'m.pdf'), 'no text on page 2, perhaps scanned')]
    assert load(tmp_path/'no-name').text == '[page 1]\nby its bytes\n'

@pytest.mark.parametrize('algorithm', ['RC4-128', 'AES-128', 'AES-256'])
def test_pdf_with_passwords(tmp_path, algorithm):
    "One that only restricts printing opens; one that wants a password says so"
    pytest.importorskip('pypdf')
    write(tmp_path, {'open.pdf': locked(a_pdf('may not be printed'), '', algorithm), 'shut.pdf': locked(a_pdf('secret'), 'user', algorithm)})
    assert 'may not be printed' in load(tmp_path/'open.pdf').text
    refused(tmp_path/'shut.pdf', 'password', 'qpdf')

def bomb():
    "A page whose stream unpacks to 500 MB"
    z = zlib.compressobj()
    packed = b''.join([*(z.compress(b' '*(1<<20)) for _ in range(500)), z.flush()])
    return a_pdf('X').replace(b'<< /Length 32 >>\nstream\nBT /F1 12 Tf 72 700 Td (X) Tj ET', b'<< /Length %d /Filter /FlateDecode >>\nstream\n%s' % (len(packed), packed))

@pytest.mark.parametrize('make,words', [(lambda: a_pdf(None, None), 'OCR'), (lambda: a_pdf(None), 'its page'), (lambda: b'%PDF-1.4\n', 'damaged PDF'), (lambda: a_pdf('x')[:200], 'damaged PDF'), (lambda: b'%PDF-1.7\n' + os.urandom(5000), 'damaged PDF'),
    (lambda: a_pdf('x').replace(b'/Kids [4 0 R]', b'/Kids [2 0 R]'), 'x.pdf'), (lambda: a_pdf('x').replace(b'/Count 1', b'/Count 99999999'), 'x.pdf')])
def test_pdf_that_cannot_be_read(tmp_path, make, words, capfd):
    pytest.importorskip('pypdf')
    write(tmp_path, {'x.pdf': make()})
    try: refused(tmp_path/'x.pdf', 'x.pdf', words)
    except pytest.fail.Exception: assert words == 'x.pdf' and load(tmp_path/'x.pdf').text.startswith('[page 1]')
    assert capfd.readouterr() == ('', '')

def test_a_reader_of_pdf_says_nothing_of_its_own(tmp_path):
    "What it logs about a damaged file does not reach the screen; other libraries' loggers stay as they are"
    pytest.importorskip('pypdf')
    write(tmp_path, {'x.pdf': a_pdf('still read').replace(b'startxref\n', b'startxref\n1')})
    code = f"from rlm.documents import *\nimport logging\nprint(load({str(tmp_path/'x.pdf')!r}).text)\nlogging.getLogger('pypdf._reader').warning('heard')"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (r.stdout, r.stderr) == ('[page 1]\nstill read\n\n', 'heard\n')

def spoiled(data, r):
    "A copy with some bytes or numbers changed, or parts gone, doubled or cut off"
    data = bytearray(data)
    for _ in range(r.choice((1, 2, 5, 20))):
        i, o = r.randrange(len(data)), r.random()
        if o < .5: data[i] = r.randrange(256)
        elif o < .6: del data[i:i+min(50, len(data)//4)]
        elif o < .7: data[i:i] = data[r.randrange(len(data)):][:200]
        elif o < .9 and (found := list(re.finditer(rb'\d+', bytes(data)))): data[slice(*r.choice(found).span())] = r.choice((b'0', b'-1', b'3', b'9'*10, b'9'*19))
        else: del data[max(100, i):]
    return bytes(data)

def test_spoiled_documents_give_text_or_one_line(tmp_path):
    pytest.importorskip('pypdf')
    page = '<!doctype html><meta charset=utf-8><title>x</title><table><tr><td>a<td>b</table><pre>x\n y</pre><a href="q">l</a><!-- c --><script>v</script><p>&amp;&#x1F600;&#xD800;'
    whole, r, read = {'x.pdf': a_pdf('Chapter one', None, 'The fee'), 'y.pdf': locked(a_pdf('secret'), '', 'AES-256'), 'x.docx': a_docx(), 'x.html': page.encode()}, random.Random(0), 0
    for name in list(whole)*100:
        try: text = to_text(name, spoiled(whole[name], r))[0]
        except DocumentError as e: assert '\n' not in str(e)
        else: read += bool(text.encode())
    assert 50 < read < 350

def test_pdf_bomb(tmp_path):
    pytest.importorskip('pypdf')
    data = bomb()
    assert len(data) > 400_000
    write(tmp_path, {'x.pdf': data})
    most, said = peak(f"load({str(tmp_path/'x.pdf')!r})")
    assert most < 400<<20 and 'damaged PDF' in said[0]

def test_without_the_extra(tmp_path):
    write(tmp_path, {'x.pdf': a_pdf('x'), 'a.txt': 'a'})
    code = f"import sys; sys.modules['pypdf'] = None\nfrom rlm.documents import *\nprint(load({str(tmp_path)!r}))\nload({str(tmp_path/'x.pdf')!r})"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.stdout.startswith('1 document, ') and r.stdout.count("pip install 'rlm[documents]'") == 1
    assert r.stderr.splitlines()[-1].endswith("x.pdf is a PDF; what reads it comes with the extra documents: pip install 'rlm[documents]'")

# stdin ---------------------------------------------------------------------------------------------------------------
def piped(data, code="print(load('-').text, end='')"):
    r = subprocess.run([sys.executable, '-c', f'from rlm.documents import *\ntry: {code}\nexcept DocumentError as e: print("refused:", e)'], input=data, capture_output=True)
    return r.stdout.decode() or r.stderr.decode()

def test_stdin(tmp_path):
    assert piped('grüße\r\n'.encode()) == 'grüße\n'
    assert piped(b'<!DOCTYPE html><p>page') == 'page\n'
    assert piped(a_pdf('piped')) == '[page 1]\npiped\n'
    assert piped(b'').startswith('refused: stdin is empty') and piped(b'\0').startswith('refused: stdin is not a text file')
    assert piped(b'x'*5000, "load('-', most=4000)").startswith('refused: stdin is more than')
    path = write(tmp_path, {'a.txt': 'a'})/'a.txt'
    assert piped(b'b', f"print(load(['-', {str(path)!r}, '-']).text)") == f'==> - <==\nb\n==> {path} <==\na\n'

# Addresses -----------------------------------------------------------------------------------------------------------
class Site(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def give(self, data, mime='text/html', code=200, **headers):
        self.send_response(code)
        if mime: self.send_header('Content-Type', mime)
        headers.setdefault('Content-Length', str(len(data)))
        for k, v in headers.items():
            if v is not None: self.send_header(k.replace('_', '-'), v)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        name = self.path.split('?')[0].strip('/')
        try: (getattr(self, 'at_' + name, None) or self.nowhere)()
        except (BrokenPipeError, ConnectionResetError): pass

    def nowhere(self): self.give(b'<h1>No</h1>', code=404)
    def at_(self): self.give(b'<html><title>Front</title>', None)
    def at_page(self): self.give('<h1>Caf\xe9</h1>'.encode('latin-1'), 'text/html; charset=ISO-8859-1')
    def at_plain(self): self.give('<b>é</b>\r\n'.encode(), 'text/plain')
    def at_json(self): self.give(b'{"a": 1}', 'application/json')
    def at_pdf(self): self.give(a_pdf('from the web'), 'application/pdf')
    def at_docx(self): self.give(a_docx(), 'application/octet-stream')
    def at_odd(self): self.give(b'text', 'text/plain; charset=klingon')
    def at_picture(self): self.give(b'\x89PNG', 'image/png')
    def at_binary(self): self.give(b'ab\0cd', 'application/octet-stream')
    def at_empty(self): self.give(b'')
    def at_login(self): self.give(b'', code=401)
    def at_fault(self): self.give(b'', code=500)
    def at_busy(self): self.give(b'', code=429)
    def at_hop(self): self.give(b'', code=302, Location='/page')
    def at_round(self): self.give(b'', code=302, Location='/round')
    def at_tofile(self): self.give(b'', code=302, Location='file:///etc/passwd')
    def at_toftp(self): self.give(b'', code=301, Location='ftp://example.com/x')
    def at_gzip(self): self.give(self.packed(b'<p>packed'), Content_Encoding='gzip')
    def at_bomb(self): self.give(self.packed(b'x'*(110<<20)), Content_Encoding='gzip')
    def at_halfzip(self): self.give(self.packed(os.urandom(5000))[:3000], Content_Encoding='gzip')
    def at_badzip(self): self.give(b'no gzip', Content_Encoding='gzip')
    def at_brotli(self): self.give(b'x', Content_Encoding='br')
    def at_short(self): self.give(b'<p>half', Content_Length='1000')
    def at_said(self): self.give(b'x', Content_Length=str(10<<30))
    def packed(self, data): return (z := zlib.compressobj(9, wbits=31)).compress(data) + z.flush()

    def at_endless(self):
        self.send_response(200)
        self.end_headers()
        while True: self.wfile.write(b'x'*65536)

    def at_silent(self): self.server.over.wait(60)

    def at_drip(self):
        self.send_response(200)
        self.end_headers()
        while not self.server.over.wait(.1): self.wfile.write(b'x')

    def at_driphead(self):
        self.wfile.write(b'HTTP/1.0 200 OK\r\nX: ')
        while not self.server.over.wait(.1): self.wfile.write(b'x')

    def at_garbage(self): self.wfile.write(b'SSH-2.0-OpenSSH\r\n')

@pytest.fixture(scope='module')
def site():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Site)
    server.daemon_threads, server.seen, server.over = True, [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f'http://127.0.0.1:{server.server_port}'
    old = {k: os.environ.pop(k) for k in list(os.environ) if k.lower() in ('http_proxy', 'all_proxy')}
    yield server
    os.environ.update(old)
    server.over.set()
    server.shutdown()
    server.server_close()

@pytest.mark.parametrize('name,text', [('', 'Front\n'), ('page', '# Café\n'), ('plain', '<b>é</b>\n'), ('json', '{"a": 1}'), ('pdf', '[page 1]\nfrom the web\n'), ('odd', 'text'), ('hop', '# Café\n'), ('gzip', 'packed\n')])
def test_pages(site, name, text):
    docs = load(f'{site.url}/{name}')
    assert docs.text == text and docs.where(0) == (f'{site.url}/{name}', 1)

def test_a_docx_from_the_web(site): assert '1,240 EUR' in load(site.url + '/docx').text

def test_what_is_sent(site):
    load(site.url + '/page?q=a b&é=/#part')
    path, headers = site.seen[-1]
    assert path == '/page?q=a%20b&%C3%A9=/' and set(headers) == {'Host', 'User-Agent', 'Accept', 'Accept-Encoding', 'Connection'} and headers['User-Agent'].startswith('rlm/')

def test_an_address_beside_a_file(site, tmp_path):
    path = write(tmp_path, {'a.txt': 'a'})/'a.txt'
    assert load([path, site.url + '/page', site.url + '/page']).text == f'==> {path} <==\na\n==> {site.url}/page <==\n# Café\n'

@pytest.mark.parametrize('name,words', [('missing', ('404', 'check the address')), ('login', ('401', 'login')), ('fault', ('500', 'try again')), ('busy', ('429', 'wait')), ('picture', ('is image/png, not text',)), ('binary', ('is not a text file',)),
    ('empty', ('is empty',)), ('round', ('redirects without end',)), ('tofile', ('neither http nor https',)), ('toftp', ('neither http nor https',)), ('badzip', ('damaged',)), ('halfzip', ('damaged',)), ('brotli', ('compressed as br',)),
    ('short', ('broke off after 7 of 1,000 bytes',)), ('said', ('more than 100.0 MB',)), ('bomb', ('more than 100.0 MB',)), ('garbage', ('connection failed',))])
def test_pages_that_cannot_be_read(site, name, words): refused(f'{site.url}/{name}', f'/{name}', *words)

def test_an_endless_page(site): refused(site.url + '/endless', 'more than 1.0 MB', most=1<<20)

@pytest.mark.parametrize('name', ['silent', 'drip', 'driphead'])
def test_a_page_that_does_not_come(site, name):
    t = time.monotonic()
    refused(f'{site.url}/{name}', 'within 1 s', timeout=1)
    assert time.monotonic() - t < 10

def test_addresses_of_nothing(site):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        refused(f'http://127.0.0.1:{s.getsockname()[1]}/', 'nothing answers there')
    refused('http://no-such-host.invalid/', 'no such host', timeout=30)
    refused('https://' + site.url[7:], 'connection failed')
    refused('ftp://example.com/x', 'ftp addresses are not read')
    refused('s3://bucket/x', 's3 addresses are not read')
    refused('file:///etc/hostname', 'give the path instead')
    for o in 'http://', 'http://:80/', 'http://a b/', 'http://x:port/', 'http://[::1/', 'http://' + 'a'*300 + '.com/', 'http://127.0.0.1:99999/': refused(o, o[:20])
    said = refused(f'http://me:hunter2@127.0.0.1:{site.server_port}/page', 'are not sent')
    assert 'hunter2' not in said

# Real texts ----------------------------------------------------------------------------------------------------------
def test_the_sources_of_a_package_and_of_python():
    "Every Python file that is found is there, whole"
    import email, rlm
    folder = Path(email.__file__).parent
    docs = load([folder, Path(rlm.__file__).parent])
    for path in [*folder.rglob('*.py'), *Path(rlm.__file__).parent.glob('*.py')]:
        if not path.stat().st_size: continue
        s = next(o for o in docs.sources if o.name == str(path))
        assert docs.text[s.start:s.end] == path.read_text(encoding='utf-8')
