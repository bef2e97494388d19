"""README.md from nbs/index.ipynb, without Quarto.

readme.py           writes it
readme.py --check   fails when it is not current"""
import re, sys
from pathlib import Path
from fastcore.nbio import read_nb
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

root = Path(__file__).resolve().parent.parent
readme = root/'README.md'

class ReadmeFilter(FilterDefaults):
    "nbdev's own page filters, less those that write front matter and links into the docs site"
    def base_procs(self): return [p for p in super().base_procs() if p.__name__ not in ('FrontmatterProc', 'insert_warning', 'add_links')]
    def nb_proc(self, nb): return NBProcessor(nb=nb, procs=self.procs())

def output_md(out):
    "One stored output as Markdown"
    data = out.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown']).strip()
    text = ''.join(data.get('text/plain') or out.get('text') or '').rstrip()
    return '\n'.join('    ' + line if line else '' for line in text.split('\n')) if text else ''

def cell_md(cell):
    "One cell of the filtered notebook as Markdown"
    if cell.cell_type == 'markdown': return cell.source.strip()
    if cell.cell_type != 'code': return ''
    hidden = cell.directives_.get('echo') == 'false' or not cell.source.strip()
    shown = [] if hidden else [f'```python\n{cell.source.strip()}\n```']
    return '\n\n'.join(shown + [o for o in map(output_md, cell.outputs) if o])

def render():
    nb = read_nb(root/'nbs'/'index.ipynb')
    ReadmeFilter()(nb)
    head = '<!-- Made from nbs/index.ipynb by scripts/readme.py: edit the notebook. -->\n\n'
    text = head + '\n\n'.join(md for md in map(cell_md, nb.cells) if md) + '\n'
    return re.sub(r'\]\((?=[\w/]+\.(ipynb|png)\))', '](nbs/', text)

if __name__ == '__main__':
    match sys.argv[1:]:
        case []: readme.write_text(render(), encoding='utf-8')
        case ['--check']:
            if readme.read_text(encoding='utf-8') != render(): sys.exit('README.md is not what nbs/index.ipynb gives: run python scripts/readme.py')
        case _: sys.exit(__doc__)
