"Everything that pip needs to know, read from settings.ini"
from configparser import ConfigParser
from setuptools import setup, find_packages

config = ConfigParser(delimiters=['='], interpolation=None)
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {name: cfg[f'{name}_requirements'].split() for name in ('local', 'documents', 'plot', 'train', 'proxy', 'dev')}
# All that the tests need but torch, whose default build for Linux brings gigabytes of CUDA: its tests skip without it.
extras['dev'] += extras['local'] + extras['documents'] + extras['plot'] + extras['proxy'] + [r for r in extras['train'] if not r.startswith('torch')]

setup(
    version=cfg['version'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    license_expression=cfg['license'],
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    packages=find_packages(include=['rlm', 'rlm.*']),
    include_package_data=True,
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=['rlm=rlm._modidx:d']),
    zip_safe=False,
)
